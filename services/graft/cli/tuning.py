"""`graft tune`: creates fine-tuning jobs, follows them, and shows what came of them."""

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graft.cli.connect import connect
from graft.cli.job_options import job_options, what_it_does
from graft.cli.output import (
    Interrupted,
    Json,
    JsonLines,
    as_dict,
    console,
    failures,
    local_time,
    print_json,
    print_table,
    short_id,
    show,
    show_fields,
    show_one,
)

if TYPE_CHECKING:
    from graft.api.v1.fine_tuning_job_pb2 import FineTuningJob
    from graft.client import Graft

JobId = Annotated[str, typer.Argument(metavar="JOB", help="Id of a job, as `tune list` shows it.")]

tune = typer.Typer(no_args_is_help=True, help="Create, follow and cancel fine-tuning jobs.")


@tune.command("create")
def tune_create(
    model: Annotated[str, typer.Argument(help="Base model, as `graft models` shows it.")],
    dataset: Annotated[str, typer.Argument(help="Data set to train on, as `graft datasets list` shows it.")],
    validation: Annotated[str, typer.Option(help="Data set for the held-out loss.")] = "",
    suffix: Annotated[str, typer.Option(help="Name of the adapter; the job's id when not given.")] = "",
    epochs: Annotated[float | None, typer.Option(help="Passes over the data. Derived when not given.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Stop after so many optimizer steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples a step. Derived when not given.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Derived when not given.")] = None,
    rank: Annotated[int, typer.Option(help="LoRA rank; 0 derives it.")] = 0,
    method: Annotated[
        str,
        typer.Option(help="supervised, self_supervised, instruction, preference or reinforcement; as the data says."),
    ] = "",
    tuning: Annotated[str, typer.Option(help="What may change: lora, last_layers or full.")] = "lora",
    served_as: Annotated[str, typer.Option(help="adapter, low_rank_delta or merged_model; derived.")] = "",
    task: Annotated[str, typer.Option(help="Template of the rows: a built-in task, or a YAML file of your own.")] = "",
    from_adapter: Annotated[str, typer.Option("--from", help="Version to train on from: base:adapter@3.")] = "",
    grader: Annotated[str, typer.Option(help="What rewards an answer; its settings with --set grader.NAME.")] = "",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Any other hyperparameter, or SECTION.NAME, as in lora.alpha or preference.beta; repeat.",
        ),
    ] = None,
    follow: Annotated[bool, typer.Option(help="Follow the job until it ends.")] = True,
    as_json: JsonLines = False,
) -> None:
    """Fine-tune MODEL on DATASET. Exit code 1 when the job fails.

    Ctrl-C stops following; the job goes on.
    """
    given = {"epochs": epochs, "max_steps": max_steps, "batch_size": batch_size, "learning_rate": learning_rate}
    with failures(as_json=as_json), connect() as graft:
        options = job_options(settings or [], method=method, tuning=tuning, task=task, grader=grader)
        hyperparameters = {name: value for name, value in given.items() if value is not None}
        options["hyperparameters"] = {**hyperparameters, **options["hyperparameters"]}
        if rank:
            options["lora"] = {"rank": rank, **options.get("lora", {})}
        options |= {
            "validation_dataset": validation,
            "suffix": suffix,
            "served_as": served_as,
            "from_adapter": from_adapter,
        }
        job = graft.create_job(model, dataset, **options)
        if as_json:
            print_json({"fine_tuning_job": as_dict(job)} if follow else as_dict(job), line=follow)
        else:
            print(f"Job {short_id(job.name)} is created: {what_it_does(job)}.", flush=True)
        if follow:
            _follow(graft, job, as_json=as_json)


@tune.command("watch")
def tune_watch(
    job: JobId,
    after: Annotated[int, typer.Option(min=0, max=2**62, help="Start behind the event with this sequence.")] = 0,
    as_json: JsonLines = False,
) -> None:
    """Follow a job until it ends. Exit code 1 unless it succeeds."""
    with failures(as_json=as_json), connect() as graft:
        _follow(graft, graft.job(job), after=after, as_json=as_json)


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


def _follow(graft: "Graft", job: "FineTuningJob", *, after: int = 0, as_json: bool) -> None:
    """Shows the job until it has ended, and exits with 1 unless it succeeded."""
    job_id = short_id(job.name)
    try:
        for update in _told(graft, job, after, as_json=as_json):
            job = update
    except KeyboardInterrupt:
        message = (
            f"Job {job_id} goes on. Follow it with `graft tune watch {job_id}`, "
            f"or end it with `graft tune cancel {job_id}`."
        )
        raise Interrupted(message, reason="INTERRUPTED", metadata={"job": job_id}) from None
    succeeded = job.state == job.STATE_SUCCEEDED
    if succeeded and not as_json:
        print(f"{job.fine_tuned_model} is ready. Try it: graft chat {job.fine_tuned_model}")
    elif not as_json:
        from graft.cli.progress import state_word

        reason = f": {job.error.message}" if job.error.message else "."
        print(f"Job {job_id} has ended as {state_word(job.state)}{reason}", file=sys.stderr)
    raise typer.Exit(0 if succeeded else 1)


def _told(graft: "Graft", job: "FineTuningJob", after: int, *, as_json: bool) -> "Iterator[FineTuningJob]":
    """The job after each of its events, which has been shown by then."""
    if as_json:
        for update in graft.watch_job(job.name, after):
            print_json(as_dict(update), line=True)
            yield update.fine_tuning_job
        return
    from graft.cli.progress import JobsProgress

    with JobsProgress(console) as progress:
        progress.add(job.name, job.suffix or short_id(job.name))
        if after:
            progress.update(job.name, job)  # the next event may be long in coming
        for update in graft.watch_job(job.name, after):
            progress.update(job.name, update.fine_tuning_job, update.event)
            yield update.fine_tuning_job
