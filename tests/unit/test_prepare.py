import json
from pathlib import Path
from typing import Any

import pytest

from graft.data.canonical import Chat, Pair
from graft.data.prepare import prepare
from graft.data.rendering import render
from graft.data.tasks import catalog
from graft.domain.errors import InvalidArgument
from graft.domain.jobs import OverLengthPolicy
from graft.domain.resources import DatasetFormat
from tests.support.tiny_llama import make_tiny_llama

CHAT = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "2"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(make_tiny_llama(tmp_path_factory.mktemp("tiny")))


def _learned(example: Any, tokenizer: Any) -> str:
    pairs = zip(example.token_ids, example.loss_mask, strict=True)
    return str(tokenizer.decode([token for token, learned in pairs if learned]))


def test_a_pair_learns_its_completion_and_the_end_token(tokenizer: Any) -> None:
    example = render(Pair("hé ", "yes"), tokenizer)
    assert tokenizer.decode(example.token_ids) == "hé yes<|im_end|>"
    assert _learned(example, tokenizer) == "yes<|im_end|>"


def test_a_chat_learns_its_assistant_turns_and_their_end_only(tokenizer: Any) -> None:
    assert _learned(render(Chat(tuple(CHAT)), tokenizer), tokenizer) == "1<|im_end|>2<|im_end|>"


def test_a_turn_of_weight_zero_is_context_only(tokenizer: Any) -> None:
    messages = [{**turn, "weight": 0} if turn["content"] == "1" else turn for turn in CHAT]
    assert _learned(render(Chat(tuple(messages)), tokenizer), tokenizer) == "2<|im_end|>"


def test_the_prompt_that_is_served_is_the_prompt_that_was_trained(tokenizer: Any) -> None:
    example = render(Chat(tuple(CHAT)), tokenizer)
    for index in (2, 4):
        served = tokenizer.apply_chat_template(CHAT[:index], tokenize=True, add_generation_prompt=True)
        served = served if isinstance(served, list) else served["input_ids"]
        assert list(example.token_ids[: len(served)]) == served
        assert example.loss_mask[len(served)]
        assert not example.loss_mask[len(served) - 1]


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer: Any) -> None:
    class Rewriting:
        eos_token_id = None
        encode = tokenizer.encode

        def apply_chat_template(self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool) -> str:  # noqa: ARG002
            return f"{len(conversation)} turns" + (" then" if add_generation_prompt else "")

    with pytest.raises(InvalidArgument, match="prompt"):
        render(Chat(tuple(CHAT)), Rewriting())


def _file(folder: Path, *lengths: int) -> Path:
    rows = [{"prompt": "p" * (length - 4), "completion": "abc"} for length in lengths]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _prepare(path: Path, tokenizer: Any, policy: OverLengthPolicy) -> Any:
    return prepare(path, DatasetFormat.PROMPT_COMPLETION, tokenizer, 20, policy)


def test_a_data_set_is_measured(tmp_path: Path, tokenizer: Any) -> None:
    stats = _prepare(_file(tmp_path, 10, 14, 20), tokenizer, OverLengthPolicy.FAIL).stats
    assert (stats.row_count, stats.example_count, stats.over_length_count) == (3, 3, 0)
    assert (stats.tokens, stats.completion_tokens) == (44, 12)
    assert (stats.longest_tokens, stats.median_tokens) == (20, 14)


def test_over_length_rows_are_dropped_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    prepared = _prepare(_file(tmp_path, 10, 25), tokenizer, OverLengthPolicy.DROP)
    assert (prepared.stats.example_count, prepared.stats.over_length_count) == (1, 1)
    assert prepared.stats.longest_tokens == 25


def test_over_length_rows_are_cut_at_the_start_and_keep_their_completion(tmp_path: Path, tokenizer: Any) -> None:
    prepared = _prepare(_file(tmp_path, 25), tokenizer, OverLengthPolicy.TRUNCATE)
    (example,) = prepared.examples
    assert len(example.token_ids) == 20
    assert _learned(example, tokenizer) == "abc<|im_end|>"


def test_a_completion_that_alone_is_too_long_is_left_out_even_when_truncating(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "p", "completion": "c" * 30}) + "\n")
    with pytest.raises(InvalidArgument, match="None of the 1"):
        _prepare(path, tokenizer, OverLengthPolicy.TRUNCATE)


def test_over_length_rows_fail_the_job_when_it_says_so(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(InvalidArgument, match="2 of 3 rows") as caught:
        _prepare(_file(tmp_path, 25, 10, 30), tokenizer, OverLengthPolicy.FAIL)
    assert [violation.field for violation in caught.value.violations] == ["row 1", "row 3"]


def test_rows_of_fields_are_learned_through_a_task_and_one_that_does_not_fit_is_named(
    tokenizer: Any, tmp_path: Path
) -> None:
    rows = [{"review": "A joy.", "sentiment": "positive"}, {"review": "Dull.", "sentiment": "negative"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = catalog.builtin("sentiment")
    made = prepare(path, DatasetFormat.FIELDS, tokenizer, 512, OverLengthPolicy.DROP, task=task)
    assert [_learned(one, tokenizer) for one in made.examples] == ["positive<|im_end|>", "negative<|im_end|>"]
    with open(path, "a") as file:
        file.write(json.dumps({"review": "So so.", "sentiment": "mixed"}) + "\n")
    with pytest.raises(InvalidArgument, match="Row 3: sentiment: 'mixed' is no label"):
        prepare(path, DatasetFormat.FIELDS, tokenizer, 512, OverLengthPolicy.DROP, task=task)
