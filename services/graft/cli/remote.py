"""Commands that talk to a gateway: models, datasets, tune, adapters, generate, chat."""

from pathlib import Path
from typing import Annotated

import typer

from graft.api.v1 import fine_tuning_job_pb2
from graft.cli.output import console, failures, show, show_one
from graft.client import Graft

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
State = fine_tuning_job_pb2.FineTuningJob.State

datasets = typer.Typer(no_args_is_help=True, help="Upload, list and delete data sets.")
tune = typer.Typer(no_args_is_help=True, help="Create and follow fine-tuning jobs.")
adapters = typer.Typer(no_args_is_help=True, help="List, name and place adapters.")


def add_to(app: typer.Typer) -> None:
    """Adds these commands to the main one."""
    app.add_typer(datasets, name="datasets")
    app.add_typer(tune, name="tune")
    app.add_typer(adapters, name="adapters")
    app.command("models")(models)
    app.command("generate")(generate)
    app.command("chat")(chat)


def _id(name: str) -> str:
    return name.rsplit("/", 1)[-1]


def models(as_json: Json = False) -> None:
    """List base models."""
    with failures(), Graft() as graft:
        columns = {
            "model": lambda m: m.model,
            "parameters": lambda m: f"{m.parameter_count / 1e6:.0f}M",
            "context": lambda m: m.context_tokens,
            "licence": lambda m: m.license,
        }
        show(graft.base_models(), columns, as_json=as_json)


@datasets.command("upload")
def datasets_upload(file: Path, as_json: Json = False) -> None:
    """Upload a JSONL file of `messages` or `prompt`/`completion` rows."""
    with failures(), Graft() as graft:
        data = graft.upload_dataset(file)
        show_one(data, f"{_id(data.name)}  {data.row_count} rows, {data.size_bytes} bytes", as_json=as_json)


@datasets.command("list")
def datasets_list(as_json: Json = False) -> None:
    """List data sets, newest first."""
    with failures(), Graft() as graft:
        columns = {"id": lambda d: _id(d.name), "name": lambda d: d.display_name, "rows": lambda d: d.row_count}
        show(graft.datasets(), columns, as_json=as_json)


@datasets.command("delete")
def datasets_delete(dataset: str) -> None:
    """Delete a data set."""
    with failures(), Graft() as graft:
        graft.delete_dataset(dataset)


@tune.command("create")
def tune_create(
    model: str,
    dataset: str,
    validation: Annotated[str, typer.Option(help="Held-out data set.")] = "",
    suffix: Annotated[str, typer.Option(help="Name of the adapter.")] = "",
    epochs: Annotated[float | None, typer.Option(help="Passes over the data; derived when not given.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Derived when not given.")] = None,
    rank: Annotated[int, typer.Option(help="LoRA rank; 0 derives it.")] = 0,
    follow: Annotated[bool, typer.Option(help="Follow the job until it ends.")] = True,
    as_json: Json = False,
) -> None:
    """Fine-tune MODEL on DATASET. Exit code 1 when the job fails."""
    given = {"epochs": epochs, "learning_rate": learning_rate}
    with failures(), Graft() as graft:
        job = graft.create_job(
            model,
            dataset,
            validation_dataset=validation,
            suffix=suffix,
            lora={"rank": rank},
            hyperparameters={name: value for name, value in given.items() if value is not None},
        )
        show_one(job, f"Job {_id(job.name)}", as_json=as_json)
    if follow:
        tune_watch(_id(job.name), as_json=as_json)


@tune.command("watch")
def tune_watch(job: str, as_json: Json = False) -> None:
    """Follow a job until it ends. Exit code 1 unless it succeeds."""
    with failures(), Graft() as graft:
        for update in graft.watch_job(job):
            show_one(update, update.event.message, as_json=as_json)
        ended = graft.job(job)
    if not as_json:
        console.print(ended.fine_tuned_model or ended.error.message or State.Name(ended.state), highlight=False)
    raise typer.Exit(0 if ended.state == State.STATE_SUCCEEDED else 1)


@tune.command("list")
def tune_list(as_json: Json = False) -> None:
    """List jobs, newest first."""
    with failures(), Graft() as graft:
        columns = {
            "id": lambda j: _id(j.name),
            "state": lambda j: State.Name(j.state).removeprefix("STATE_"),
            "step": lambda j: f"{j.progress.step}/{j.progress.total_steps}",
            "result": lambda j: j.fine_tuned_model,
        }
        show(graft.jobs(), columns, as_json=as_json)


@tune.command("cancel")
def tune_cancel(job: str, as_json: Json = False) -> None:
    """Ask a job to end."""
    with failures(), Graft() as graft:
        show_one(graft.cancel_job(job), "Cancellation requested.", as_json=as_json)


@adapters.command("list")
def adapters_list(as_json: Json = False) -> None:
    """List adapters and their aliases."""
    with failures(), Graft() as graft:
        columns = {
            "model": lambda a: a.model,
            "newest": lambda a: a.newest_version,
            "aliases": lambda a: ", ".join(f"{alias} → {number}" for alias, number in sorted(a.aliases.items())),
        }
        show(graft.adapters(), columns, as_json=as_json)


@adapters.command("alias")
def adapters_alias(model: str, alias: str, version: int, as_json: Json = False) -> None:
    """Point ALIAS of MODEL (base:adapter) at VERSION."""
    with failures(), Graft() as graft:
        show_one(graft.set_alias(model, alias, version), f"{model}@{alias} is version {version}.", as_json=as_json)


@adapters.command("residency")
def adapters_residency(as_json: Json = False) -> None:
    """Show what every replica holds."""
    with failures(), Graft() as graft:
        columns = {
            "replica": lambda r: r.replica,
            "ready": lambda r: r.ready,
            "adapters": lambda r: ", ".join(adapter.model for adapter in r.adapters),
        }
        show(graft.residency(), columns, as_json=as_json)


def generate(
    model: str,
    prompt: str,
    max_tokens: int = 128,
    choice: Annotated[list[str] | None, typer.Option(help="Answer is one of these; repeat.")] = None,
    as_json: Json = False,
) -> None:
    """Continue a raw PROMPT."""
    with failures(), Graft() as graft:
        answer = graft.generate(model, prompt=prompt, max_tokens=max_tokens, choices=choice or [])
        show_one(answer, answer.text, as_json=as_json)


def chat(model: str, message: str, max_tokens: int = 128) -> None:
    """Answer one MESSAGE, printed as it comes."""
    with failures(), Graft() as graft:
        for piece in graft.stream(model, messages=[{"role": "user", "content": message}], max_tokens=max_tokens):
            console.print(piece.text, end="", markup=False, highlight=False)
        console.print()
