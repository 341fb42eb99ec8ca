"""`graft compare`, and `graft evaluations`: asks for comparisons on held-out data, follows them, and shows them."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graft.cli.connect import connect
from graft.cli.output import (
    Interrupted,
    Json,
    as_dict,
    console,
    failures,
    local_time,
    print_json,
    short_id,
    show,
    show_one,
)
from graft.cli.uploading import Format, uploaded
from graft.domain.errors import FailedPrecondition, InvalidArgument

if TYPE_CHECKING:
    from graft.api.v1.evaluation_pb2 import Evaluation
    from graft.client import Graft
    from graft.client.requests import EvaluationOptions
    from graft.evaluation.comparison import Comparison

POLL_SECONDS = 0.5
EvaluationId = Annotated[
    str, typer.Argument(metavar="EVALUATION", help="Id of an evaluation, as `evaluations list` shows it.")
]

evaluations = typer.Typer(no_args_is_help=True, help="List, show and cancel evaluations.")


def add_to(app: typer.Typer) -> None:
    """Adds these commands to the main one."""
    app.command("compare")(compare)
    app.add_typer(evaluations, name="evaluations")


def compare(
    dataset: Annotated[
        str, typer.Argument(help="Held-out data: a data set's id, or a file or URL that is uploaded first.")
    ],
    models: Annotated[
        list[str], typer.Argument(help="Who is compared: base, base:adapter@version; MODEL/8 with eight shots.")
    ],
    shots: Annotated[int, typer.Option(help="Adds each base model once more, with so many examples before.")] = 0,
    shots_from: Annotated[str, typer.Option(help="Data set, or file, of the shots: the training data.")] = "",
    metric: Annotated[list[str] | None, typer.Option(help="A metric; repeat. As the task or the data says.")] = None,
    task: Annotated[str, typer.Option(help="Template of rows of named fields: a built-in task, or a file.")] = "",
    grader: Annotated[
        str, typer.Option(help="What judges answers: to graded prompts, or by a task to rows of fields.")
    ] = "",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="grader.NAME=VALUE", help="Settings of the grader; repeat.")
    ] = None,
    max_rows: Annotated[int, typer.Option(help="Ask so many rows, chosen by their content; all when 0.")] = 0,
    samples: Annotated[int, typer.Option(help="Answers sampled for each prompt that is graded.")] = 0,
    max_tokens: Annotated[int, typer.Option(help="Longest answer; as the task says.")] = 0,
    name: Annotated[str, typer.Option(help="Name for people.")] = "",
    format: Format = "",
    report: Annotated[Path | None, typer.Option(help="Where to write the HTML report.")] = None,
    as_json: Json = False,
) -> None:
    """Compare models on held-out data: quality with intervals, latency, speed and size, and who wins.

    Ctrl-C stops following; the evaluation goes on.
    """
    from graft.cli.job_options import job_options

    with failures(as_json=as_json), connect() as graft:
        job = job_options(settings or [], method="", tuning="lora", task=task, grader=grader)
        options: EvaluationOptions = {
            "metrics": metric or [],
            "max_rows": max_rows,
            "samples": samples,
            "max_tokens": max_tokens,
            "display_name": name,
            "task": job.get("task", ""),
            "task_definition": job.get("task_definition", ""),
        }
        if grader:
            options["grader"] = job["method_options"]["grader"]
        contestants = _contestants(models, shots)
        if shots_from:
            options["shots_dataset"] = uploaded(graft, shots_from, format, as_json=as_json)
        asked = uploaded(graft, dataset, format, as_json=as_json)
        made = graft.create_evaluation(asked, contestants, **options)
        done = _follow(graft, made, as_json=as_json)
        _show(graft, done, report, as_json=as_json)


@evaluations.command("list")
def evaluations_list(as_json: Json = False) -> None:
    """List evaluations, newest first."""
    with failures(as_json=as_json), connect() as graft:
        columns: dict[str, Callable[..., object]] = {
            "ID": lambda e: short_id(e.name),
            "STATE": lambda e: _state(e),
            "ANSWERED": lambda e: f"{e.answered_requests}/{e.total_requests}" if e.total_requests else "",
            "CREATED": lambda e: local_time(e.create_time),
            "CONTESTANTS": lambda e: ", ".join(one.model for one in e.contestants),
            "VERDICT": lambda e: e.verdicts[0] if e.verdicts else e.error.message,
        }
        show(graft.evaluations(), columns, as_json=as_json, none="No evaluations yet. Start one with `graft compare`.")


@evaluations.command("get")
def evaluations_get(
    evaluation: EvaluationId,
    report: Annotated[Path | None, typer.Option(help="Where to write the HTML report.")] = None,
    as_json: Json = False,
) -> None:
    """Follow an evaluation to its end, and show what was found."""
    with failures(as_json=as_json), connect() as graft:
        _show(graft, _follow(graft, graft.evaluation(evaluation), as_json=as_json), report, as_json=as_json)


@evaluations.command("cancel")
def evaluations_cancel(evaluation: EvaluationId, as_json: Json = False) -> None:
    """Ask an evaluation to end. It does soon after."""
    with failures(as_json=as_json), connect() as graft:
        show_one(graft.cancel_evaluation(evaluation), "Cancellation is requested.", as_json=as_json)


def _contestants(models: Sequence[str], shots: int) -> list[tuple[str, int]]:
    """`MODEL` or `MODEL/SHOTS`, and each base once more with `shots`. Raises InvalidArgument."""
    found: list[tuple[str, int]] = []
    for text in models:
        model, slash, count = text.partition("/")
        if slash and not count.isdecimal():
            raise InvalidArgument(f"{text!r}: write MODEL, or MODEL/8 for eight shots.", reason="INVALID_NAME")
        found.append((model, int(count or 0)))
        if shots and ":" not in model and not slash:
            found.append((model, shots))
    return list(dict.fromkeys(found))


def _state(evaluation: "Evaluation") -> str:
    return type(evaluation).State.Name(evaluation.state).removeprefix("STATE_").lower()


def _follow(graft: "Graft", evaluation: "Evaluation", *, as_json: bool) -> "Evaluation":
    """Waits for the end. Raises FailedPrecondition when it is not success."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    kind = type(evaluation)
    waiting = (kind.STATE_QUEUED, kind.STATE_RUNNING)
    evaluation_id = short_id(evaluation.name)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console, transient=True, disable=as_json) as progress:
            line = progress.add_task(f"evaluation {evaluation_id}", total=None)
            while evaluation.state in waiting:
                progress.update(line, completed=evaluation.answered_requests, total=evaluation.total_requests or None)
                time.sleep(POLL_SECONDS)
                evaluation = graft.evaluation(evaluation.name)
    except KeyboardInterrupt:
        message = (
            f"Evaluation {evaluation_id} goes on. Follow it with `graft evaluations get {evaluation_id}`, "
            f"or end it with `graft evaluations cancel {evaluation_id}`."
        )
        raise Interrupted(message, reason="INTERRUPTED", metadata={"evaluation": evaluation_id}) from None
    if evaluation.state == kind.STATE_SUCCEEDED:
        return evaluation
    reason = f": {evaluation.error.message}" if evaluation.error.message else "."
    raise FailedPrecondition(
        f"Evaluation {evaluation_id} has ended as {_state(evaluation)}{reason}", reason="EVALUATION_NOT_SUCCEEDED"
    )


def _show(graft: "Graft", evaluation: "Evaluation", report: Path | None, *, as_json: bool) -> None:
    """What was found, and then the report: a file that cannot be written must not take the figures with it."""
    if as_json:
        print_json(as_dict(evaluation))
    else:
        _print(evaluation)
    if report is not None:
        page = graft.evaluation_report(evaluation.name)
        try:
            report.parent.mkdir(parents=True, exist_ok=True)
            report.write_bytes(page)
        except OSError as error:
            raise InvalidArgument(
                f"{report} cannot be written: {error.strerror}. The report is kept: `graft evaluations get "
                f"{short_id(evaluation.name)} --report FILE` writes it.",
                reason="UNWRITABLE_FILE",
            ) from None
        if not as_json:
            print(f"Report: {report}.")


def _print(evaluation: "Evaluation") -> None:
    from graft.cli.comparing import print_comparison

    comparison = comparison_of(evaluation)
    print_comparison(console, comparison)
    for remark in evaluation.verdicts[1:]:  # the first is the headline
        if remark not in comparison.remarks:
            print(remark)
    mlflow = f" MLflow run {evaluation.mlflow_run_id}." if evaluation.mlflow_run_id else ""
    print(f"Evaluation {short_id(evaluation.name)}.{mlflow}")


def comparison_of(evaluation: "Evaluation") -> "Comparison":
    """The comparison that the evaluation's figures tell."""
    from datetime import UTC

    from graft.evaluation.comparison import Candidate, ComparedTask, Comparison, Result, Speed
    from graft.evaluation.confusion import Confusion
    from graft.evaluation.figures import Figure

    results, candidates = [], []
    for found in evaluation.results:
        tuned = ":" in found.model
        candidates.append(
            Candidate(
                found.label,
                found.model,
                tuned,
                found.parameter_count,
                found.size_bytes,
                found.memory_bytes or None,
            )
        )
        width = len(found.confusion.labels) + 1
        counts = list(found.confusion.counts)
        matrix = Confusion(
            tuple(found.confusion.labels),
            tuple(tuple(counts[start : start + width]) for start in range(0, len(counts), width)),
        )
        results.append(
            Result(
                found.label,
                speed=Speed(
                    found.latency_p50_seconds or None,
                    found.latency_p95_seconds or None,
                    found.tokens_per_second or None,
                ),
                figures={one.metric: Figure(one.metric, one.value, one.low, one.high, one.n) for one in found.figures},
                differences={
                    one.baseline: Figure(
                        one.figure.metric, one.figure.value, one.figure.low, one.figure.high, one.figure.n
                    )
                    for one in found.differences
                },
                confusion=matrix if found.HasField("confusion") else None,
            )
        )
    metrics = tuple(dict.fromkeys(figure.metric for found in evaluation.results for figure in found.figures))
    title = evaluation.display_name or f"data set {short_id(evaluation.dataset)}"
    task = ComparedTask(
        name=short_id(evaluation.dataset), title=title, source="", license="", metrics=metrics, results=tuple(results)
    )
    return Comparison(
        title=title,
        candidates=tuple(candidates),
        tasks=(task,),
        created=evaluation.create_time.ToDatetime(tzinfo=UTC),
    )
