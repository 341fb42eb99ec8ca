"""Rows of named fields as training rows, through a task's templates. Does not know files, formats or tokenizers."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from graft.data.tasks.definition import TaskDefinition
from graft.data.tasks.reading import MAX_LABELS
from graft.data.tasks.templates import render_completion, render_prompt
from graft.domain.errors import FieldViolation, InvalidArgument
from graft.domain.resources import DatasetFormat

Row = Mapping[str, Any]

FORMATS = frozenset({DatasetFormat.FIELDS, DatasetFormat.QUESTION_ANSWER, DatasetFormat.ALPACA})
"""Formats whose rows are fields for a task's template. Rows of all others hold their prompt already."""
CONVERSATIONS = frozenset({DatasetFormat.MESSAGES, DatasetFormat.SHAREGPT})
"""Formats of whole chats, which a task of conversations learns as they are."""


def to_training_row(task: TaskDefinition, row: Row) -> dict[str, Any]:
    """A row of `messages`, or of `prompt` and `completion`, that says the same. Further fields are not looked at.

    Raises InvalidArgument (INVALID_TASK_ROW) naming each field at fault.
    """
    completion = task.completion.field
    answer = text_of(row.get(completion), completion)
    allowed = task.labels if task.decoding.choose_label else ()
    faults = []
    if not (answer or "").strip():
        faults.append(FieldViolation(completion, "is missing: it holds the answer, and there is nothing to learn"))
    elif allowed and answer not in allowed:
        known = ", ".join(allowed[:10]) + (f" and {len(allowed) - 10} more" if len(allowed) > 10 else "")
        faults.append(FieldViolation(completion, f"{str(answer)[:80]!r} is no label of the task: {known}"))
    try:
        inputs = inputs_of(task, row)
        prompt = render_prompt(task, inputs)
    except InvalidArgument as error:
        faults += [FieldViolation(one.field.removeprefix("inputs."), one.description) for one in error.violations]
        if not faults:
            raise
    if faults or answer is None:
        raise InvalidArgument(
            "; ".join(f"{fault.field}: {fault.description}" for fault in faults) + ".",
            reason="INVALID_TASK_ROW",
            metadata={"task": task.name},
            violations=tuple(faults),
        )
    learned = render_completion(task, inputs, answer)
    if isinstance(prompt, str):
        return {"prompt": prompt, "completion": learned}
    return {"messages": [*prompt, {"role": "assistant", "content": learned}]}


def labels_of(task: TaskDefinition, rows: Iterable[Row]) -> tuple[str, ...]:
    """The different values of the completion's field, in alphabetical order.

    Raises InvalidArgument (INVALID_LABELS) for fewer than two, and as soon as they are too many for labels.
    """
    found: set[str] = set()
    field = task.completion.field
    for row in rows:
        label = text_of(row.get(field), field)
        if label is not None and label.strip():
            found.add(label)
        if len(found) > MAX_LABELS:
            break
    if not 2 <= len(found) <= MAX_LABELS:
        shown = f"more than {MAX_LABELS}" if len(found) > MAX_LABELS else f"{len(found)}"
        description = (
            f"takes its labels from the data, which has {shown} different values of {field!r}; "
            f"2 to {MAX_LABELS} are labels to choose from"
        )
        raise InvalidArgument(
            f"The task {task.name!r} {description}.",
            reason="INVALID_LABELS",
            violations=(FieldViolation("task", description),),
        )
    return tuple(sorted(found))


def labelled(task: TaskDefinition, rows: Iterable[Row]) -> TaskDefinition:
    """The task with the labels of its data, if that is where it takes them from. Raises as `labels_of`."""
    return task.with_labels(labels_of(task, rows)) if task.labels_from_data else task


def trained_as(task: TaskDefinition | None, row: Row, format: DatasetFormat) -> tuple[Row, DatasetFormat]:
    """The row that training reads in place of one of `format`, and the format of that.

    The same row without a task, and where it is a whole chat and the task is one of conversations. Raises as
    `to_training_row`.
    """
    if task is None or (task.conversations and format in CONVERSATIONS):
        return row, format
    made = to_training_row(task, row)
    return made, DatasetFormat.MESSAGES if task.is_chat else DatasetFormat.PROMPT_COMPLETION


def to_prompt(task: TaskDefinition, row: Row) -> list[dict[str, str]] | str:
    """The prompt of a row alone, for answers that are graded rather than learned. Raises as `render_prompt`."""
    return render_prompt(task, inputs_of(task, row))


def inputs_of(task: TaskDefinition, row: Row) -> dict[str, str]:
    """The row's values of the task's fields, as the texts that a request would send."""
    texts = {one.name: text_of(row.get(one.name), one.name) for one in task.fields}
    return {name: text for name, text in texts.items() if text is not None}


def text_of(value: Any, field: str) -> str | None:
    """A value of a row as text: numbers and truth values as JSON writes them; None for null.

    Raises InvalidArgument naming `field` for a list or an object.
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    description = "is a list or an object; a field of a task is a text, a number, true or false"
    raise InvalidArgument(
        f"{field}: {description}.", reason="INVALID_TASK_ROW", violations=(FieldViolation(field, description),)
    )
