"""How the command prints: tables and sentences for people, JSON with `--json`, failures with an exit code.

Owns the form. `print_json` writes all JSON there is: a single object is indented, one of a stream takes one line.
Everything that is slow to import is imported where it is used, so that `graft --help` is quick.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from graft.domain.errors import FailedPrecondition, GraftError, InvalidArgument, NotFound, Unavailable
from graft.domain.units import size_text as size_text

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
JsonLines = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]

console = Console()


class Interrupted(GraftError):
    """Ctrl-C, where there is something to say about it."""

    code = "CANCELLED"


EXIT_CODES: dict[type[GraftError], int] = {
    InvalidArgument: 2,
    FailedPrecondition: 2,
    NotFound: 3,
    Unavailable: 4,
    Interrupted: 130,
}
"""0 success, 1 any other failure, 2 a wrong argument, setting or state, 3 not found, 4 unavailable, 130 Ctrl-C."""


@contextmanager
def failures(*, as_json: bool = False) -> Iterator[None]:
    """Prints a domain error, and the fields at fault, to standard error and exits with its code."""
    try:
        yield
    except GraftError as error:
        print_failure(error, as_json=as_json)
        raise typer.Exit(EXIT_CODES.get(type(error), 1)) from None
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_CODES[Interrupted]) from None


def print_failure(error: GraftError, *, as_json: bool = False) -> None:
    """The error as a sentence and its fields, or as `{"error": {...}}`, on standard error."""
    violations = [{"field": fault.field, "description": fault.description} for fault in error.violations]
    if as_json:
        told = {
            "code": error.code,
            "reason": error.reason,
            "message": error.message,
            "metadata": error.metadata,
            "violations": violations,
        }
        print_json({"error": told}, line=True, file=sys.stderr)
        return
    print(error.message, file=sys.stderr)
    for fault in error.violations:
        # Some messages consist of their violations already.
        if fault.description.rstrip(".") not in error.message:
            print(f"  {fault.field}: {fault.description}", file=sys.stderr)


def as_dict(message: Any) -> Any:
    """A protobuf message as JSON's types, with the contract's field names. Zeros and empty lists are told too."""
    from google.protobuf.json_format import MessageToDict

    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def print_json(value: Any, *, line: bool = False, file: Any = None) -> None:
    """`value`, indented, or on one `line`. Sent off at once, for those who read it as it comes.

    A number that is none, as the loss of a training that ran away, is null: JSON has no NaN.
    """
    told = json.dumps(_finite(value), indent=None if line else 1, ensure_ascii=False, allow_nan=False)
    print(told, file=file, flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show(
    messages: Sequence[Any], columns: Mapping[str, Callable[[Any], object]], *, as_json: bool, none: str = ""
) -> None:
    """Protobuf messages: as a JSON list, or as a table with a function of the message a column.

    `none` is said to people when there are no messages.
    """
    if as_json:
        print_json([as_dict(message) for message in messages])
    elif messages or not none:
        print_table(list(columns), [[column(message) for column in columns.values()] for message in messages])
    else:
        print(none)


def show_one(message: Any, text: str, *, as_json: bool) -> None:
    """One protobuf message as JSON, or a sentence."""
    if as_json:
        print_json(as_dict(message))
    else:
        print(text)


def show_fields(message: Any, fields: Mapping[str, object], *, as_json: bool) -> None:
    """One protobuf message as JSON, or its `fields`, one a line, without those that are empty."""
    if as_json:
        print_json(as_dict(message))
    else:
        print_table([], [[name, value] for name, value in fields.items() if value not in ("", None)])


def print_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Columns without lines around them, folded to a terminal's width. Elsewhere each row is one line, for grep."""
    if not console.is_terminal:
        lines = [
            [" ".join(str(cell).splitlines()) for cell in line] for line in ([headers] if headers else []) + list(rows)
        ]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=bool(headers), padding=(0, 2, 0, 0))
    for header in headers or [""] * len(rows[0] if rows else []):
        table.add_column(header, overflow="fold")
    for row in rows:
        # Never markup: file names and messages may hold brackets.
        table.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    console.print(table, highlight=False)


def local_time(timestamp: "Timestamp") -> str:
    """`2026-01-02 03:04:05` in the reader's time zone; empty for an unset time."""
    if not timestamp.ToNanoseconds():
        return ""
    return timestamp.ToDatetime(tzinfo=UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def short_id(name: str) -> str:
    """The last segment of a resource name."""
    return name.rsplit("/", 1)[-1]
