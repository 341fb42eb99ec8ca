"""Rows of named fields as training rows, through a task's templates. Does not know files, formats or tokenizers."""

import json
from collections.abc import Mapping
from typing import Any

from graft.data.tasks.definition import TaskDefinition
from graft.data.tasks.templates import render_completion, render_prompt
from graft.domain.errors import FieldViolation, InvalidArgument

Row = Mapping[str, Any]


def to_training_row(task: TaskDefinition, row: Row) -> dict[str, Any]:
    """A row of `messages`, or of `prompt` and `completion`, that says the same. Further fields are not looked at.

    A row that is a whole chat is returned as it is by a task of conversations.

    Raises InvalidArgument (INVALID_TASK_ROW) naming each field at fault.
    """
    if task.conversations and "messages" in row:
        return dict(row)
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
