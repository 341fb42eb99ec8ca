"""`graft datasets validate`: checks a file here, without a gateway, and shows what a job would find in it."""

import os
from dataclasses import asdict
from itertools import dropwhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graft.cli.bar import Bar
from graft.cli.output import Json, failures, print_json, print_table, size_text
from graft.domain.errors import FailedPrecondition, FieldViolation, InvalidArgument
from graft.domain.reports import DatasetReport, FoundRows

if TYPE_CHECKING:
    from graft.data.analysis import Base
    from graft.data.formats import FileReport

BAR_CHARACTERS = 40
MOST_LABELS_SHOWN = 12


def datasets_validate(
    file: Annotated[Path, typer.Argument(help="JSONL, CSV or Parquet file.")],
    base_model: Annotated[
        str, typer.Option(metavar="BASE", help="Base model that counts the tokens; the served one when not given.")
    ] = "",
    held_out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Held-out file, looked through for rows that are in both.")
    ] = None,
    format: Annotated[str, typer.Option(metavar="FORMAT", help="How to read the rows, as for `datasets upload`.")] = "",
    task: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="Task whose template makes text of rows of named fields.")
    ] = "",
    context_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest row that fits; the base model's context when not given.")
    ] = None,
    epochs: Annotated[float, typer.Option(min=0.0, help="Of the estimate of time.")] = 1.0,
    tokens_per_second: Annotated[
        float | None, typer.Option(min=0.001, help="Speed of training, for the estimate of time; else a measured one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a data set file: format, lengths, duplicates, leakage, balance, conflicts, time to train.

    Works on the file as it is here; nothing is uploaded. Exit code 2 when a row is bad.
    """
    from graft.cli.tasks import loaded_task
    from graft.data.analysis import analyse

    with failures(as_json=as_json), Bar() as bar:
        definition = loaded_task(task) if task else None
        checked = _validate(file, format, bar)
        other = None if held_out is None else (held_out, _validate_held_out(held_out, format, checked, bar))
        base, note = _base(base_model, context_tokens)
        rows = checked.row_count + (other[1].row_count if other else 0)
        bar.begin("Measuring", rows)
        report = analyse(
            file,
            checked,
            base=base,
            task=definition,
            held_out=other,
            epochs=epochs,
            tokens_per_second=tokens_per_second,
            progress=bar.at,
        )
    if as_json:
        told = asdict(report)
        print_json({**told, "notes": [*report.notes, *filter(None, [note])]})
    else:
        _show(report, note)


def _validate_held_out(path: Path, format: str, training: "FileReport", bar: Bar) -> "FileReport":
    """Its own format, or the training file's where it may have several."""
    try:
        return _validate(path, format, bar)
    except InvalidArgument as error:
        if error.reason != "AMBIGUOUS_DATASET":
            raise
        return _validate(path, training.format.value, bar)


def _validate(path: Path, format: str, bar: Bar) -> "FileReport":
    from graft.data.formats import validate_file
    from graft.domain.resources import DatasetFormat

    if format and format not in list(DatasetFormat):
        raise InvalidArgument(
            f"{format!r} is not a format; use one of {', '.join(DatasetFormat)}.",
            reason="INVALID_FORMAT",
            violations=(FieldViolation("format", f"{format!r} is not a format"),),
        )
    try:
        bar.begin(f"Checking {path.name}", path.stat().st_size)
        return validate_file(path, DatasetFormat(format) if format else None, bar.at)
    except OSError as error:
        raise InvalidArgument(
            f"{path} cannot be read: {error.strerror}.",
            reason="UNREADABLE_FILE",
            violations=(FieldViolation("path", str(path)),),
        ) from None


def _base(asked: str, context_tokens: int | None) -> "tuple[Base | None, str]":
    """The base model with its tokenizer, or what to do to have one. Raises NotFound for one that was asked for and that
    the catalogue does not have."""
    from graft import settings as graft_settings
    from graft.registry.base_models import base_model_source, load_catalog

    settings = graft_settings.load()
    base_id = asked or settings.serving.base_model
    found = next((base for base in load_catalog(settings) if base.id == base_id), None)
    if found is None:
        try:
            base_model_source(settings, base_id)
        except FailedPrecondition as error:
            return None, f"No tokens were counted. {error.message}"
        return None, (
            f"No tokens were counted: {base_id} is not converted yet. `graft up` converts it once; then ask again."
        )
    from graft import offline
    from graft.data.analysis import Base
    from graft.data.tokenizers import import_tokenizers, load_tokenizer

    offline.stay()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns that torch is missing, which is not missed here
    try:
        import_tokenizers()
        tokenizer = load_tokenizer(found.path)
    except ImportError:
        return (
            None,
            "No tokens were counted: transformers is not installed. Install it with `pip install transformers`.",
        )
    return Base(base_id, tokenizer, context_tokens or found.context_tokens, found.parameter_count), ""


def _show(report: DatasetReport, note: str) -> None:
    unit = report.length_unit
    task: list[list[object]] = [["task", report.task]] if report.task else []
    lines: list[list[object]] = [
        ["format", report.format + (f" (ignores {', '.join(report.ignored_fields)})" if report.ignored_fields else "")],
        *task,
        ["rows", f"{report.row_count:,}"],
        ["size", size_text(report.size_bytes)],
    ]
    if report.tokens is not None:
        lines.append(["tokens", f"{report.tokens:,} by {report.base_model}, {report.learned_tokens:,} of them learned"])
    lines.append(["length", f"{report.shortest:,} to {report.longest:,} {unit}, median {report.median:,}"])
    if report.over_length is not None:
        lines.append([f"over {report.context_tokens:,} tokens", _rows(report.over_length)])
    if report.unusable is not None and report.unusable.count:
        lines.append(
            ["refused by the template" if not report.task else "refused by task or template", _rows(report.unusable)]
        )
    lines += [
        ["duplicates", _rows(report.duplicates)],
        ["empty inputs", _rows(report.empty)],
        ["conflicting answers", _rows(report.conflicting)],
    ]
    if report.leaked is not None:
        lines.append(["held-out rows", f"{report.held_out_row_count:,}"])
        lines.append(["of them also trained on", _rows(report.leaked)])
    if report.estimate is not None:
        made = report.estimate
        epochs = f"{made.epochs:g} epoch" + ("" if made.epochs == 1 else "s")
        lines.append(
            ["time to train", f"{_duration(made.seconds)} for {epochs} at {made.tokens_per_second:,.0f} tokens/s"]
        )
        lines.append(["", f"({made.basis})"])
    print_table([], lines)
    bins = list(dropwhile(lambda one: not one.row_count, report.histogram))
    _bars(f"Rows by {unit}", [(f"{one.start:,} to {one.end - 1:,}", one.row_count) for one in bins])
    shown = report.labels[:MOST_LABELS_SHOWN]
    _bars("Rows by completion", [(one.label, one.row_count) for one in shown])
    if len(report.labels) > len(shown):
        print(f"and {len(report.labels) - len(shown)} more completions")
    for text in filter(None, [*report.notes, note]):
        print(f"\n{text}")


def _rows(found: FoundRows) -> str:
    if not found.count:
        return "none"
    first = ", ".join(map(str, found.first_rows)) + (" …" if found.count > len(found.first_rows) else "")
    return f"{found.count:,} (row {first})" if found.count == 1 else f"{found.count:,} (rows {first})"


def _bars(title: str, counts: list[tuple[str, int]]) -> None:
    """A bar a line; the longest has BAR_CHARACTERS."""
    if not counts:
        return
    most = max(count for _, count in counts) or 1
    print(f"\n{title}")
    label_width, count_width = max(len(label) for label, _ in counts), len(f"{most:,}")
    for label, count in counts:
        bar = "█" * max(round(BAR_CHARACTERS * count / most), 1 if count else 0)
        print(f"  {label.rjust(label_width)}  {count:>{count_width},}  {bar}".rstrip())


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
