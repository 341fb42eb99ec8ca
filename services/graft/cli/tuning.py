"""`graft tune`: creates fine-tuning jobs, follows them, and shows what came of them."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graft.cli.connect import connect
from graft.cli.creating import (
    BatchSize,
    Dataset,
    Epochs,
    Follow,
    Form,
    FromAdapter,
    Grader,
    MaxSteps,
    Method,
    Model,
    ServedAs,
    SetOptions,
    Suffix,
    Task,
    TuningKind,
    Validation,
    create_job,
    numbers,
)
from graft.cli.following import follow_job
from graft.cli.job_options import memory_text, what_it_does
from graft.cli.output import (
    Json,
    JsonLines,
    as_dict,
    failures,
    local_time,
    print_table,
    short_id,
    show,
    show_fields,
    show_one,
)
from graft.cli.trials import print_trials, trials_of
from graft.cli.uploading import Format

if TYPE_CHECKING:
    from graft.api.v1.fine_tuning_job_pb2 import FineTuningJob

JobId = Annotated[str, typer.Argument(metavar="JOB", help="Id of a job, as `tune list` shows it.")]

tune = typer.Typer(no_args_is_help=True, help="Create, follow and cancel fine-tuning jobs.")


@tune.command("create")
def tune_create(
    model: Model,
    dataset: Dataset,
    validation: Validation = "",
    format: Format = "",
    suffix: Suffix = "",
    epochs: Epochs = None,
    max_steps: MaxSteps = None,
    batch_size: BatchSize = None,
    learning_rate: Annotated[float | None, typer.Option(help="Derived when not given.")] = None,
    rank: Annotated[int, typer.Option(help="LoRA rank; 0 derives it.")] = 0,
    method: Method = "",
    tuning: TuningKind = "lora",
    served_as: ServedAs = "",
    task: Task = "",
    from_adapter: FromAdapter = "",
    grader: Grader = "",
    settings: SetOptions = None,
    follow: Follow = True,
    as_json: JsonLines = False,
) -> None:
    """Fine-tune MODEL on DATASET. Exit code 1 when the job fails.

    Ctrl-C stops following; the job goes on.
    """
    with failures(as_json=as_json), connect() as graft:
        form = Form(method, tuning, task, grader, validation, suffix, served_as, from_adapter)
        given = {"epochs": epochs, "max_steps": max_steps, "batch_size": batch_size, "learning_rate": learning_rate}
        options = form.options(settings or [], given)
        if rank:
            options["lora"] = {"rank": rank, **options.get("lora", {})}
        create_job(graft, model, dataset, options, format, follow=follow, as_json=as_json)


@tune.command("sweep")
def tune_sweep(
    model: Model,
    dataset: Dataset,
    learning_rate: Annotated[
        str, typer.Option(metavar="A,B,…", help="Learning rates to try; around the derived one when not given.")
    ] = "",
    rank: Annotated[str, typer.Option(metavar="A,B,…", help="LoRA ranks to try; the derived one when not given.")] = "",
    max_trials: Annotated[int, typer.Option(min=0, help="Most combinations; 0: all, at most 16.")] = 0,
    grace_steps: Annotated[int, typer.Option(min=0, help="Fewest steps before a trial may end early.")] = 0,
    reduction_factor: Annotated[float, typer.Option(min=0, help="One trial of so many goes on; 0: 3.")] = 0.0,
    max_concurrent_trials: Annotated[int, typer.Option(min=0, help="Most at a time; 0: as many as fit.")] = 0,
    validation: Validation = "",
    format: Format = "",
    suffix: Suffix = "",
    epochs: Epochs = None,
    max_steps: MaxSteps = None,
    batch_size: BatchSize = None,
    method: Method = "",
    task: Task = "",
    from_adapter: FromAdapter = "",
    settings: SetOptions = None,
    follow: Follow = True,
    as_json: JsonLines = False,
) -> None:
    """Fine-tune MODEL on DATASET with several learning rates and ranks, and keep the best by held-out loss.

    Trials that fall behind end early (ASHA). Needs --validation, or --set validation_fraction=0.1. Exit code 1 when
    the job fails. Ctrl-C stops following; the job goes on.
    """
    with failures(as_json=as_json), connect() as graft:
        form = Form(method, "lora", task, "", validation, suffix, "", from_adapter)
        options = form.options(settings or [], {"epochs": epochs, "max_steps": max_steps, "batch_size": batch_size})
        options["sweep"] = {
            "learning_rates": numbers("learning-rate", learning_rate, float),
            "ranks": numbers("rank", rank, int),
            "max_trials": max_trials,
            "grace_steps": grace_steps,
            "reduction_factor": reduction_factor,
            "max_concurrent_trials": max_concurrent_trials,
        }
        create_job(graft, model, dataset, options, format, follow=follow, as_json=as_json)


@tune.command("watch")
def tune_watch(
    job: JobId,
    after: Annotated[int, typer.Option(min=0, max=2**62, help="Start behind the event with this sequence.")] = 0,
    as_json: JsonLines = False,
) -> None:
    """Follow a job until it ends. Exit code 1 unless it succeeds."""
    with failures(as_json=as_json), connect() as graft:
        follow_job(graft, graft.job(job), after=after, as_json=as_json)


@tune.command("list")
def tune_list(as_json: Json = False) -> None:
    """List jobs, newest first."""
    with failures(as_json=as_json), connect() as graft:
        from graft.cli.progress import state_word

        columns: dict[str, Callable[..., object]] = {
            "ID": lambda j: short_id(j.name),
            "ADAPTER": lambda j: j.suffix or short_id(j.name),
            "STATE": lambda j: state_word(j.state),
            "STEP": lambda j: f"{j.progress.step}/{j.progress.total_steps}" if j.progress.total_steps else "",
            "LOSS": lambda j: f"{j.progress.loss:.4f}" if j.progress.step else "",
            "CREATED": lambda j: local_time(j.create_time),
            "RESULT": lambda j: j.fine_tuned_model or j.error.message,
        }
        none = "No jobs yet. Create one with `graft tune create MODEL DATASET`."
        show(graft.jobs(), columns, as_json=as_json, none=none)


@tune.command("get")
def tune_get(job: JobId, as_json: Json = False) -> None:
    """Show one job, with every hyperparameter as used and why."""
    with failures(as_json=as_json), connect() as graft:
        from graft.cli.progress import state_word

        found = graft.job(job)
        progress = found.progress
        fields = {
            "id": short_id(found.name),
            "state": state_word(found.state) + (", cancel requested" if _cancelling(found) else ""),
            "result": found.fine_tuned_model,
            "error": found.error.message,
            "what it does": what_it_does(found),
            "memory to train": memory_text(found),
            "base model": found.base_model,
            "training data": short_id(found.training_dataset),
            "validation data": short_id(found.validation_dataset),
            "adapter": found.suffix or short_id(found.name),
            "attempt": found.attempt,
            "step": f"{progress.step} of {progress.total_steps}" if progress.total_steps else "",
            "loss": f"{progress.loss:.4f}" if progress.step else "",
            "tokens per second": f"{progress.tokens_per_second:.0f}" if progress.step else "",
            "created": local_time(found.create_time),
            "started": local_time(found.start_time),
            "ended": local_time(found.end_time),
            **{name: f"{value:g}" for name, value in sorted(found.metrics.items())},
        }
        show_fields(found, fields, as_json=as_json)
        if not as_json and found.resolved_hyperparameters:
            print()
            values = [as_dict(one) for one in found.resolved_hyperparameters]
            print_table(
                ["HYPERPARAMETER", "VALUE", "DERIVED", "WHY"],
                [
                    [one["name"], _value_text(one["value"]), "yes" if one["derived"] else "no", one["reason"]]
                    for one in values
                ],
            )
        if not as_json and found.HasField("sweep") and found.HasField("end_time"):
            for trials in filter(None, map(trials_of, graft.job_events(job))):
                print()
                print_trials(trials)


@tune.command("events")
def tune_events(job: JobId, as_json: Json = False) -> None:
    """List what has happened to a job."""
    with failures(as_json=as_json), connect() as graft:
        from graft.api.v1.fine_tuning_job_pb2 import FineTuningJobEvent

        columns: dict[str, Callable[..., object]] = {
            "#": lambda e: e.sequence,
            "TIME": lambda e: local_time(e.create_time),
            "LEVEL": lambda e: FineTuningJobEvent.Level.Name(e.level).removeprefix("LEVEL_").lower(),
            "TYPE": lambda e: e.type,
            "MESSAGE": lambda e: e.message,
        }
        show(graft.job_events(job), columns, as_json=as_json)


@tune.command("checkpoints")
def tune_checkpoints(job: JobId, as_json: Json = False) -> None:
    """List the checkpoints that a job has saved."""
    with failures(as_json=as_json), connect() as graft:
        columns: dict[str, Callable[..., object]] = {
            "STEP": lambda c: c.step,
            "ATTEMPT": lambda c: c.attempt,
            "TIME": lambda c: local_time(c.create_time),
            "METRICS": lambda c: ", ".join(f"{name} {value:g}" for name, value in sorted(c.metrics.items())),
            "PLACE": lambda c: c.uri,
        }
        show(graft.job_checkpoints(job), columns, as_json=as_json, none="No checkpoint has been saved.")


@tune.command("cancel")
def tune_cancel(job: JobId, as_json: Json = False) -> None:
    """Ask a job to end. It does soon after."""
    with failures(as_json=as_json), connect() as graft:
        show_one(graft.cancel_job(job), "Cancellation is requested.", as_json=as_json)


def _cancelling(job: "FineTuningJob") -> bool:
    return bool(job.cancel_requested) and not job.HasField("end_time")


def _value_text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
