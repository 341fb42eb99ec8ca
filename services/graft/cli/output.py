"""How the command prints: tables for people, JSON with `--json`, and failures as one sentence with an exit code."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from google.protobuf.json_format import MessageToDict
from rich.console import Console
from rich.table import Table

from graft.domain.errors import FailedPrecondition, GraftError, InvalidArgument, NotFound, Unavailable

console = Console()

EXIT_CODES: dict[type[GraftError], int] = {InvalidArgument: 2, FailedPrecondition: 2, NotFound: 3, Unavailable: 4}
"""0 success, 1 any other failure, 2 a wrong argument, setting or state, 3 not found, 4 unavailable, 130 Ctrl-C."""


@contextmanager
def failures() -> Iterator[None]:
    """Prints a domain error, and the fields at fault, to standard error and exits with its code."""
    try:
        yield
    except GraftError as error:
        print(error.message, file=sys.stderr)
        for violation in error.violations:
            print(f"  {violation.field}: {violation.description}", file=sys.stderr)
        raise typer.Exit(EXIT_CODES.get(type(error), 1)) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def show(messages: Sequence[Any], columns: dict[str, Any], *, as_json: bool) -> None:
    """Protobuf messages: as a JSON list, or as a table with a function of the message a column."""
    if as_json:
        print(json.dumps([MessageToDict(message, preserving_proto_field_name=True) for message in messages], indent=1))
        return
    table = Table(*columns)
    for message in messages:
        table.add_row(*(str(column(message)) for column in columns.values()))
    console.print(table)


def show_one(message: Any, text: str, *, as_json: bool) -> None:
    """One protobuf message as JSON, or a sentence."""
    print(json.dumps(MessageToDict(message, preserving_proto_field_name=True)) if as_json else text)
