"""`graft tasks`: the tasks that Graft brings, and what a task makes of a user's rows. Needs no stack."""

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graft.cli.output import Json, failures, print_json, print_table
from graft.domain.errors import AlreadyExists, FieldViolation, InvalidArgument

if TYPE_CHECKING:
    from graft.data.tasks.definition import TaskDefinition

CHECKED_ROWS = 1000
"""Read by `tasks check`: seconds even for long rows. All rows are checked when a job is validated."""
REPORTED_ROWS = 10
SUFFIXES = (".yaml", ".yml", ".json")
"""What a definition's file is called, so that a mistyped path is not taken for a task's name."""

tasks = typer.Typer(no_args_is_help=True, help="List, show, write and try definitions of tasks.")


@tasks.command("list")
def tasks_list(as_json: Json = False) -> None:
    """List the tasks that Graft brings."""
    from graft.data.tasks import catalog

    found = [catalog.builtin(name) for name in catalog.names()]
    if as_json:
        print_json([_told(task) for task in found])
        return
    rows = [[task.name, ", ".join(_fields(task)), task.completion.field, task.description] for task in found]
    print_table(["TASK", "FIELDS", "COMPLETION", "ABOUT"], rows)


@tasks.command("show")
def tasks_show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A task, as `tasks list` shows it.")],
    as_json: Json = False,
) -> None:
    """Show the definition of a task that Graft brings."""
    from graft.data.tasks import catalog

    with failures(as_json=as_json):
        text = catalog.text(name)
        if as_json:
            print_json(_told(catalog.builtin(name)))
        else:
            print(text, end="")


@tasks.command("new")
def tasks_new(
    file: Annotated[Path, typer.Argument(help="File to write; it must not exist.")],
    start: Annotated[str, typer.Option("--from", metavar="NAME", help="Task to start from.")] = "custom",
    labels: Annotated[list[str] | None, typer.Option("--label", help="A label of the answers; repeat.")] = None,
    as_json: Json = False,
) -> None:
    """Write a definition to edit: a commented one, or a copy of a task that Graft brings."""
    from graft.data.tasks import catalog

    with failures(as_json=as_json):
        text = catalog.builtin(start).with_labels(tuple(labels)).to_text() if labels else catalog.text(start)
        try:
            with open(file, "x", encoding="utf-8") as opened:
                opened.write(text)
        except FileExistsError:
            raise AlreadyExists(
                f"{file} exists. Name another file, or remove it first.", reason="FILE_EXISTS"
            ) from None
        except OSError as error:
            raise InvalidArgument(f"{file} cannot be written: {error.strerror}.", reason="UNWRITABLE_FILE") from None
    if as_json:
        print_json({"file": str(file)})
    else:
        print(f"{file} is written. Edit it, then try it on your rows: graft tasks check {file} --data ROWS")


@tasks.command("check")
def tasks_check(
    task: Annotated[str, typer.Argument(metavar="FILE|NAME", help="A definition's file, or a task that Graft brings.")],
    data: Annotated[Path | None, typer.Option(metavar="ROWS", help="JSONL, CSV or Parquet file of rows.")] = None,
    as_json: Json = False,
) -> None:
    """Check a definition, and show what it makes of the first row. Reads the first 1000 rows."""
    from graft.data.tasks.templates import Message

    with failures(as_json=as_json):
        found = loaded_task(task)
        rendered: dict[str, str | list[Message]] = {}
        count = 0
        if data is not None:
            found, rendered, count = _tried(found, data)
    if as_json:
        print_json({"task": _told(found), "first_row": rendered or None, "rows_checked": count})
        return
    print(f"{found.name}, version {found.version}: {', '.join(_fields(found))} → {found.completion.field}")
    if found.labels:
        print(f"labels: {', '.join(found.labels)}")
    prompt = rendered.get("prompt", rendered.get("messages", ()))
    turns = [("prompt", prompt)] if isinstance(prompt, str) else [(turn["role"], turn["content"]) for turn in prompt]
    if "completion" in rendered:
        turns.append(("completion", str(rendered["completion"])))
    for role, text in turns:
        print(f"\n[{role}]\n{text}")
    if count:
        print(f"\n{count} rows fit." if count < CHECKED_ROWS else f"\nThe first {count} rows fit.")


def loaded_task(value: str) -> "TaskDefinition":
    """The definition of `--task NAME|FILE`. Raises NotFound, and InvalidArgument for a file that cannot be
    read or holds no good definition."""
    from graft.data.tasks import catalog
    from graft.data.tasks.definition import load

    return load(read_definition(value)) if is_definition(value) else catalog.builtin(value)


def is_definition(value: str) -> bool:
    """Whether `--task NAME|FILE` names a file."""
    return value.endswith(SUFFIXES) or "/" in value or Path(value).is_file()


def read_definition(value: str) -> str:
    """The text of a definition's file. Raises InvalidArgument when it cannot be read."""
    try:
        return Path(value).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InvalidArgument(
            f"{value} cannot be read: {why}.",
            reason="UNREADABLE_FILE",
            violations=(FieldViolation("task", value),),
        ) from None


def _tried(task: "TaskDefinition", data: Path) -> "tuple[TaskDefinition, dict[str, str | list[dict[str, str]]], int]":
    """The task with its labels, its first row as it is trained on, and how many rows were looked at.

    Raises InvalidArgument with the first rows that do not fit.
    """
    from graft.data.reading import read_rows
    from graft.data.tasks.rows import labels_of, to_training_row

    try:
        rows = list(islice(read_rows(data), CHECKED_ROWS))
    except OSError as error:
        raise InvalidArgument(f"{data} cannot be read: {error.strerror}.", reason="UNREADABLE_FILE") from None
    if not rows:
        raise InvalidArgument(f"{data} has no rows.", reason="BAD_DATASET")
    if task.labels_from_data and task.completion.field in rows[0]:
        task = task.with_labels(labels_of(task, rows))
    rendered: dict[str, str | list[dict[str, str]]] = {}
    wrong: list[FieldViolation] = []
    bad = 0
    for number, row in enumerate(rows, start=1):
        try:
            made = to_training_row(task, row)
        except InvalidArgument as error:
            bad += 1
            if bad <= REPORTED_ROWS:
                wrong.append(FieldViolation(f"row {number}", error.message))
            continue
        rendered = rendered or made
    if bad:
        raise InvalidArgument(
            f"{bad} of {len(rows)} rows do not fit the task {task.name!r}.",
            reason="INVALID_TASK_ROW",
            violations=tuple(wrong),
        )
    return task, rendered, len(rows)


def _fields(task: "TaskDefinition") -> list[str]:
    return [f"{one.name}?" if one.optional else one.name for one in task.fields]


def _told(task: "TaskDefinition") -> dict[str, object]:
    from dataclasses import asdict

    return {**asdict(task), "digest": task.digest}
