"""Named inputs of a request as the prompt that the model was trained with, and the task's own way of decoding.

Owns what a request with `inputs` may hold beside them. The rendering itself is `graft.data.tasks.templates`, which
training calls too. Does not know tokenizers: the engine puts a chat into the model's chat template, as training did.
"""

from graft.data.tasks.catalog import stored
from graft.data.tasks.definition import TaskDefinition
from graft.data.tasks.templates import render_choices, render_prompt
from graft.domain.errors import FailedPrecondition, FieldViolation, InvalidArgument
from graft.gateway.resolving import Resolution
from graft.internal.v1 import engine_pb2

INPUTS = "inputs"
_OTHER_INPUTS = ("messages", "prompt")
_CONSTRAINTS = ("structured_outputs", "response_format", "tools")
"""Any of them already says what an answer may look like."""


def rendered(
    resolution: Resolution, endpoint: engine_pb2.Endpoint.ValueType, body: dict[str, object]
) -> tuple[engine_pb2.Endpoint.ValueType, dict[str, object]]:
    """The endpoint and body that ask what `inputs` mean; both as they are without `inputs`.

    Without an endpoint (ENDPOINT_UNSPECIFIED) the template decides between chat and raw text.

    Raises InvalidArgument for inputs that do not fit the task, and for a model or an endpoint that has no use for them.
    """
    inputs = body.get(INPUTS)
    if inputs is None:
        return endpoint, body
    if not isinstance(inputs, dict):
        raise _refused('is not an object of texts, such as {"review": "..."}')
    if given := [name for name in _OTHER_INPUTS if body.get(name)]:
        raise _refused(f"are rendered as the prompt, and there is `{given[0]}` too: give one of them")
    task = _task(resolution)
    own = engine_pb2.ENDPOINT_CHAT_COMPLETIONS if task.is_chat else engine_pb2.ENDPOINT_COMPLETIONS
    if endpoint not in (own, engine_pb2.ENDPOINT_UNSPECIFIED):
        fitting = "/v1/chat/completions" if task.is_chat else "/v1/completions"
        kind = "turns of a chat" if task.is_chat else "raw text"
        raise _refused(f"make {kind} through the task {task.name!r} of {resolution.public_model}: ask {fitting}")
    prompt = render_prompt(task, inputs)
    kept = {key: value for key, value in body.items() if key not in (INPUTS, *_OTHER_INPUTS)}
    return own, {**kept, **_decoding(task, inputs, kept), "messages" if task.is_chat else "prompt": prompt}


def _task(resolution: Resolution) -> TaskDefinition:
    if not resolution.task_definition:
        raise InvalidArgument(
            f"inputs: {resolution.public_model} was trained without a task, so that nothing says what its inputs are. "
            "Send a prompt or messages, or name an adapter that was trained with a task.",
            reason="NO_TASK",
            metadata={"model": resolution.public_model},
            violations=(FieldViolation(INPUTS, "the model was trained without a task"),),
        )
    try:
        return stored(resolution.task_definition)
    except InvalidArgument as error:
        raise FailedPrecondition(
            f"The task of {resolution.public_model} cannot be read by this version of Graft: {error.message}",
            reason="TASK_NOT_READABLE",
            metadata={"model": resolution.public_model},
        ) from None


def _decoding(task: TaskDefinition, inputs: dict[str, str], asked: dict[str, object]) -> dict[str, object]:
    """What the task adds where the request leaves it open."""
    added: dict[str, object] = {}
    if asked.get("max_tokens") is None and asked.get("max_completion_tokens") is None:
        added["max_tokens"] = task.decoding.max_tokens
    if asked.get("temperature") is None:
        added["temperature"] = task.decoding.temperature
    if not asked.get("stop") and task.decoding.stop:
        added["stop"] = list(task.decoding.stop)
    if not any(asked.get(key) for key in _CONSTRAINTS) and (choices := render_choices(task, inputs)):
        added["structured_outputs"] = {"choice": list(choices)}
    return added


def _refused(description: str) -> InvalidArgument:
    return InvalidArgument(
        f"inputs: {description}.", reason="INVALID_INPUTS", violations=(FieldViolation(INPUTS, description),)
    )
