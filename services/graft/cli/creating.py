"""What `graft tune create` and `graft tune sweep` share: their options, and the job made of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from graft.cli.following import follow_job
from graft.cli.job_options import job_options, memory_text, what_it_does
from graft.cli.output import as_dict, print_json, short_id
from graft.cli.uploading import uploaded
from graft.domain.errors import FieldViolation, InvalidArgument

if TYPE_CHECKING:
    from graft.client import Graft
    from graft.client.requests import JobOptions

NumberT = TypeVar("NumberT", int, float)

Validation = Annotated[str, typer.Option(help="Data set, or file, for the held-out loss.")]
Suffix = Annotated[str, typer.Option(help="Name of the adapter; the job's id when not given.")]
Epochs = Annotated[float | None, typer.Option(help="Passes over the data. Derived when not given.")]
MaxSteps = Annotated[int | None, typer.Option(help="Stop after so many optimizer steps.")]
BatchSize = Annotated[int | None, typer.Option(help="Examples a step. Derived when not given.")]
Method = Annotated[
    str,
    typer.Option(help="supervised, self_supervised, instruction, preference or reinforcement; as the data says."),
]
TuningKind = Annotated[str, typer.Option(help="What may change: lora, last_layers or full.")]
ServedAs = Annotated[str, typer.Option(help="adapter, low_rank_delta or merged_model; derived.")]
Task = Annotated[str, typer.Option(help="Template of the rows: a built-in task, or a YAML file of your own.")]
FromAdapter = Annotated[str, typer.Option("--from", help="Version to train on from: base:adapter@3.")]
Grader = Annotated[str, typer.Option(help="What rewards an answer; its settings with --set grader.NAME.")]
SetOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Any other hyperparameter, or SECTION.NAME, as in lora.alpha or preference.beta; repeat.",
    ),
]
Follow = Annotated[bool, typer.Option(help="Follow the job until it ends.")]
Model = Annotated[str, typer.Argument(help="Base model, as `graft models` shows it.")]
Dataset = Annotated[str, typer.Argument(help="A data set's id, or a file or URL that is uploaded first.")]


@dataclass(frozen=True)
class Form:
    """The text options, as they were given; empty: not at all."""

    method: str
    tuning: str
    task: str
    grader: str
    validation: str
    suffix: str
    served_as: str
    from_adapter: str

    def options(self, settings: Sequence[str], given: Mapping[str, float | None]) -> "JobOptions":
        """Options of the SDK; `given` are hyperparameters, over which `--set` rules. Raises InvalidArgument."""
        options = job_options(settings, method=self.method, tuning=self.tuning, task=self.task, grader=self.grader)
        hyperparameters = {name: value for name, value in given.items() if value is not None}
        options["hyperparameters"] = {**hyperparameters, **options["hyperparameters"]}
        options |= {
            "validation_dataset": self.validation,
            "suffix": self.suffix,
            "served_as": self.served_as,
            "from_adapter": self.from_adapter,
        }
        return options


def create_job(
    graft: "Graft", model: str, dataset: str, options: "JobOptions", format: str, *, follow: bool, as_json: bool
) -> None:
    """Uploads what is a file, as `format`; creates the job, says so, and follows it if asked to."""
    validation = options.get("validation_dataset", "")
    options["validation_dataset"] = uploaded(graft, validation, format, as_json=as_json)
    job = graft.create_job(model, uploaded(graft, dataset, format, as_json=as_json), **options)
    if as_json:
        print_json({"fine_tuning_job": as_dict(job)} if follow else as_dict(job), line=follow)
    else:
        print(f"Job {short_id(job.name)} is created: {what_it_does(job)}.", flush=True)
        if needed := memory_text(job):
            print(f"Training needs about {needed} in a worker.", flush=True)
    if follow:
        follow_job(graft, job, as_json=as_json)


def numbers(option: str, text: str, kind: Callable[[str], NumberT]) -> list[NumberT]:
    """The values of `A,B,…`; none of an empty text. Raises InvalidArgument."""
    try:
        return [kind(part) for part in text.split(",")] if text else []
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        description = f"{text!r} is no list of {what} with commas between"
        raise InvalidArgument(
            f"--{option}: {description}.", reason="INVALID_VALUE", violations=(FieldViolation(option, description),)
        ) from None
