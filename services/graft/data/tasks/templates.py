"""A task's prompt and completion as text, from the values of its fields.

The one place that renders: training calls it with rows, the gateway with a request's inputs, so that the served prompt
is the trained one.
"""

from collections.abc import Mapping

from graft.data.tasks import sandbox
from graft.data.tasks.definition import TaskDefinition
from graft.data.tasks.sandbox import LABELS, Values
from graft.domain.errors import FieldViolation, InvalidArgument

Message = dict[str, str]
"""`role` and `content`."""


def render_prompt(task: TaskDefinition, inputs: Mapping[str, str]) -> list[Message] | str:
    """Chat turns that end with the user's, or raw text.

    Raises InvalidArgument naming every input that is missing, unknown or no text (INVALID_INPUTS), or as
    `graft.data.tasks.sandbox.render`.
    """
    values: Values = {**_checked(task, inputs), LABELS: task.labels}
    if not task.is_chat:
        return sandbox.render(task.prompt, values)
    system = sandbox.render(task.system, values) if task.system else ""
    turns = [("system", system), ("user", sandbox.render(task.user, values))]
    # A system turn without text is none: some chat templates put in one of their own only then.
    return [{"role": role, "content": text} for role, text in turns if role == "user" or text.strip()]


def render_completion(task: TaskDefinition, inputs: Mapping[str, str], answer: str) -> str:
    """The text that is learned for an answer. Raises as `render_prompt`."""
    if not task.completion.template:
        return answer
    values: Values = {**_checked(task, inputs), task.completion.field: answer, LABELS: task.labels}
    return sandbox.render(task.completion.template, values)


def render_choices(task: TaskDefinition, inputs: Mapping[str, str]) -> tuple[str, ...]:
    """The texts of which an answer is one, as they were learned; none: any text. Raises as `render_prompt`."""
    chosen = task.labels if task.decoding.choose_label else task.decoding.choices
    return tuple(render_completion(task, inputs, one) for one in chosen)


def _checked(task: TaskDefinition, inputs: Mapping[str, str]) -> dict[str, str]:
    known = [one.name for one in task.fields]
    faults = [
        FieldViolation(f"inputs.{name[:80]}", f"is no field of the task {task.name!r}")
        for name in inputs
        if name not in known
    ]
    for one in task.fields:
        value = inputs.get(one.name, "")
        if not isinstance(value, str):
            faults.append(FieldViolation(f"inputs.{one.name}", "is not a text"))
        elif not one.optional and not value.strip():
            what = f" ({one.description.rstrip('.')})" if one.description else ""
            faults.append(FieldViolation(f"inputs.{one.name}", f"is missing{what}"))
    if faults:
        told = "; ".join(f"{fault.field}: {fault.description}" for fault in faults)
        optional = [name for name in known if name not in task.required]
        fields = f"it needs {', '.join(task.required) or 'none'}" + (
            f", and may have {', '.join(optional)}" if optional else ""
        )
        raise InvalidArgument(
            f"{told}. The task {task.name!r} has these fields: {fields}.",
            reason="INVALID_INPUTS",
            metadata={"task": task.name, "fields": ", ".join(known)},
            violations=tuple(faults),
        )
    return {name: inputs.get(name, "") for name in known}
