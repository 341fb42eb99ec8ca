"""What each method reads from its rows. The tiny tokenizer has a token a byte, and one for the end."""

import json
import tracemalloc
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from graft.data.prepare import Example, Prepared, prepare
from graft.data.rendering import prompt_ids
from graft.data.split import Split
from graft.data.tasks.catalog import builtin
from graft.data.tasks.rows import to_prompt
from graft.domain.errors import InvalidArgument
from graft.domain.jobs import Hyperparameters, Job, JobSpec, JobState, LossOn, Method, OverLengthPolicy, Reinforcement
from graft.domain.resources import Dataset, DatasetFormat
from graft.orchestrator.preparer import TokenizingPreparer
from tests.support.adapters import tiny_base
from tests.support.tiny_llama import make_tiny_llama

CONTEXT_TOKENS = 20


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(make_tiny_llama(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def read(tmp_path: Path, tokenizer: Any) -> Any:
    def read(rows: list[dict[str, Any]], format: DatasetFormat, **options: Any) -> Prepared:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        policy = options.pop("policy", OverLengthPolicy.FAIL)
        return prepare(path, format, tokenizer, CONTEXT_TOKENS, policy, **options)

    return read


def _text(read: Any, *texts: str, **options: Any) -> Prepared:
    rows = [{"text": text} for text in texts]
    found: Prepared = read(rows, DatasetFormat.TEXT, method=Method.SELF_SUPERVISED, **options)
    return found


def _learned(example: Example, tokenizer: Any) -> str:
    pairs = zip(example.token_ids, example.loss_mask, strict=True)
    return str(tokenizer.decode([token for token, learned in pairs if learned]))


def test_a_document_is_learned_whole_and_ends_with_the_end_token(read: Any, tokenizer: Any) -> None:
    (example,) = _text(read, "to be or not").examples
    assert tokenizer.decode(example.token_ids) == "to be or not<|im_end|>"
    assert all(example.loss_mask)


@pytest.mark.parametrize("length", [18, 19, 20, 37, 38, 39, 57, 100])
def test_every_token_of_a_long_document_but_its_first_is_predicted_once(read: Any, tokenizer: Any, length: int) -> None:
    text = "".join(chr(ord("a") + index % 26) for index in range(length))
    prepared = _text(read, text)
    assert all(2 <= len(piece.token_ids) <= CONTEXT_TOKENS for piece in prepared.examples)
    predicted = [token for piece in prepared.examples for token in piece.token_ids[1:]]
    assert tokenizer.decode(predicted) == text[1:] + "<|im_end|>"
    assert prepared.stats.completion_tokens == length
    assert prepared.stats.example_count == len(prepared.examples)


@pytest.mark.parametrize("policy", list(OverLengthPolicy))
def test_the_policy_for_long_rows_does_not_apply_to_documents(read: Any, policy: OverLengthPolicy) -> None:
    stats = _text(read, "a" * 50, "b", policy=policy).stats
    assert (stats.row_count, stats.over_length_count, stats.longest_tokens) == (2, 1, 51)
    assert stats.example_count == 4


def test_pieces_never_mix_documents(read: Any, tokenizer: Any) -> None:
    said = [tokenizer.decode(piece.token_ids) for piece in _text(read, "a" * 25, "b" * 25).examples]
    assert said == ["a" * 20, "a" * 6 + "<|im_end|>", "b" * 20, "b" * 6 + "<|im_end|>"]


def test_loss_on_all_learns_the_prompt_too_after_cutting_it(read: Any, tokenizer: Any) -> None:
    rows = [{"prompt": "p" * 30, "completion": "yes"}, {"prompt": "q", "completion": "no"}]
    options = {"policy": OverLengthPolicy.TRUNCATE}
    cut, short = read(rows, DatasetFormat.PROMPT_COMPLETION, loss_on=LossOn.ALL, **options).examples
    assert _learned(cut, tokenizer) == "p" * 16 + "yes<|im_end|>"
    assert _learned(short, tokenizer) == "qno<|im_end|>"
    cut, short = read(rows, DatasetFormat.PROMPT_COMPLETION, **options).examples
    assert _learned(cut, tokenizer) == "yes<|im_end|>"


def test_instruction_has_no_choice_of_what_is_learned(read: Any, tokenizer: Any) -> None:
    turns = [{"role": "user", "content": ""}, {"role": "assistant", "content": "1"}]
    rows = [{"messages": turns}]
    prepared = read(
        rows, DatasetFormat.MESSAGES, method=Method.INSTRUCTION, loss_on=LossOn.ALL, policy=OverLengthPolicy.TRUNCATE
    )
    assert _learned(prepared.examples[0], tokenizer) == "1<|im_end|>"


def _pairs(read: Any, *rows: tuple[str, str, str], **options: Any) -> Prepared:
    made = [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in rows]
    found: Prepared = read(made, DatasetFormat.PREFERENCE, method=Method.PREFERENCE, **options)
    return found


def test_a_preference_is_two_sequences_that_learn_their_answers(read: Any, tokenizer: Any) -> None:
    prepared = _pairs(read, ("q? ", "yes", "never"))
    (pair,) = prepared.pairs
    assert [tokenizer.decode(side.token_ids) for side in (pair.chosen, pair.rejected)] == [
        "q? yes<|im_end|>",
        "q? never<|im_end|>",
    ]
    assert [_learned(side, tokenizer) for side in (pair.chosen, pair.rejected)] == ["yes<|im_end|>", "never<|im_end|>"]
    assert (prepared.examples, list(prepared.sequences)) == ((), [pair.chosen])
    assert (prepared.stats.tokens, prepared.stats.completion_tokens, prepared.stats.longest_tokens) == (16, 10, 9)


def test_earlier_answers_in_the_prompt_of_a_preference_are_not_learned(tmp_path: Path, tokenizer: Any) -> None:
    asked = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    row = {
        "prompt": asked,
        "chosen": [{"role": "assistant", "content": "good"}],
        "rejected": [{"role": "assistant", "content": "bad"}],
    }
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    (pair,) = prepare(
        path, DatasetFormat.PREFERENCE, tokenizer, 200, OverLengthPolicy.FAIL, method=Method.PREFERENCE
    ).pairs
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(pair.chosen.token_ids) == prompt + "good<|im_end|>"
    assert _learned(pair.chosen, tokenizer) == "good<|im_end|>"
    assert _learned(pair.rejected, tokenizer) == "bad<|im_end|>"


def test_both_answers_lose_the_same_of_a_prompt_that_is_too_long(read: Any, tokenizer: Any) -> None:
    rows = [("0123456789abcdef", "yes", "never")]
    (pair,) = _pairs(read, *rows, policy=OverLengthPolicy.TRUNCATE).pairs
    assert tokenizer.decode(pair.chosen.token_ids) == "23456789abcdefyes<|im_end|>"
    assert tokenizer.decode(pair.rejected.token_ids) == "23456789abcdefnever<|im_end|>"
    with pytest.raises(InvalidArgument, match="1 of 1 rows are longer"):
        _pairs(read, *rows)
    dropped = _pairs(read, *rows, ("q", "a", "b"), policy=OverLengthPolicy.DROP)
    assert (len(dropped.pairs), dropped.stats.over_length_count) == (1, 1)


def test_rows_without_two_answers_are_no_preference(read: Any) -> None:
    with pytest.raises(InvalidArgument, match="Row 1: prompt_completion rows") as caught:
        read([{"prompt": "a", "completion": "b"}], DatasetFormat.PROMPT_COMPLETION, method=Method.PREFERENCE)
    assert caught.value.reason == "NOT_A_PREFERENCE"


def test_the_two_sides_of_a_split_are_all_rows_once(read: Any, tokenizer: Any) -> None:
    texts = [f"text {number}" for number in range(40)]
    sides = [_text(read, *texts, split=Split(0.25, held_out)).examples for held_out in (True, False)]
    said = [tokenizer.decode(piece.token_ids, skip_special_tokens=True) for side in sides for piece in side]
    assert sorted(said) == sorted(texts)
    assert 0 < len(sides[0]) < len(sides[1])


def test_the_first_of_a_data_set_are_as_many_as_fit_and_at_least_one(read: Any) -> None:
    prepared = _text(read, "a" * 9, "b" * 9, "c" * 9)
    assert len(prepared.within(2, 1000).examples) == 2
    assert len(prepared.within(9, 29).examples) == 2
    assert len(prepared.within(9, 30).examples) == 3
    assert len(prepared.within(9, 1).examples) == 1
    assert len(_pairs(read, ("q", "a", "b"), ("q", "c", "d")).within(9, 6).pairs) == 1


def test_a_job_is_planned_from_the_rows_that_it_does_not_hold_out(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": f"a longer text {number}"}) + "\n" for number in range(40)))
    dataset = Dataset("ds", "default", "rows", DatasetFormat.TEXT, 40, 1, "sha256:d", str(data), now)
    asked = Hyperparameters(validation_fraction=0.25, context_tokens=8)
    spec = JobSpec("tiny", "ds", method=Method.SELF_SUPERVISED, hyperparameters=asked)
    job = Job("ft-1", "default", spec, JobState.VALIDATING, now, now)
    base = tiny_base(make_tiny_llama(tmp_path / "base"))
    found = TokenizingPreparer().prepare(job, base, dataset, None)
    assert found.validation is not None
    assert found.training.row_count + found.validation.row_count == 40
    assert 0 < found.validation.row_count < found.training.row_count < found.training.example_count
    reasons = {item.name: item.reason for item in found.resolved}
    assert reasons["over_length_policy"].endswith("are longer than the context and cut into pieces: it does not apply.")


def test_a_graded_prompt_is_what_the_service_makes_of_it_and_keeps_its_row(read: Any, tokenizer: Any) -> None:
    rows = [{"prompt": "1 + 1?", "answer": 2}, {"prompt": "x", "answer": 3, "tests": ["a"]}]
    prepared = read(rows, DatasetFormat.GRADED_PROMPTS, method=Method.REINFORCEMENT)
    assert [tokenizer.decode(prompt.token_ids) for prompt in prepared.prompts] == ["1 + 1?", "x"]
    assert [dict(prompt.row) for prompt in prepared.prompts] == rows
    assert prepared.examples == ()
    assert (prepared.stats.example_count, prepared.stats.tokens, prepared.stats.completion_tokens) == (2, 7, 0)


def test_a_graded_chat_ends_where_the_answer_begins(read: Any, tokenizer: Any) -> None:
    rows = [{"messages": [{"role": "user", "content": "hi"}]}]
    (prompt,) = read(
        rows, DatasetFormat.GRADED_PROMPTS, method=Method.REINFORCEMENT, policy=OverLengthPolicy.TRUNCATE
    ).prompts
    whole = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode(whole, add_special_tokens=False)
    assert list(prompt.token_ids) == ids[-CONTEXT_TOKENS:], "the start of a longer prompt is cut"


def test_rows_without_a_prompt_to_grade_are_refused_with_what_to_use(read: Any) -> None:
    with pytest.raises(InvalidArgument, match="Row 1: text rows are no prompts to be graded") as refused:
        read([{"text": "a"}], DatasetFormat.TEXT, method=Method.REINFORCEMENT)
    assert refused.value.reason == "NOT_A_GRADED_PROMPT"


def test_a_prompt_leaves_room_for_its_answer_in_the_engines_context(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": "x" * length}) + "\n" for length in (10, 40, 41)))
    dataset = Dataset("ds", "default", "rows", DatasetFormat.GRADED_PROMPTS, 3, 1, "sha256:d", str(data), now)
    spec = JobSpec("tiny", "ds", method=Method.REINFORCEMENT, reinforcement=Reinforcement(max_completion_tokens=24))
    job = Job("ft-1", "default", spec, JobState.VALIDATING, now, now)
    base = tiny_base(make_tiny_llama(tmp_path / "base"))
    preparer = TokenizingPreparer("127.0.0.1:9000", "tiny", engine_context_tokens=64)
    found = preparer.prepare(job, base, dataset, None)
    assert (found.training.example_count, found.training.over_length_count) == (2, 1)
    planned = preparer.plan(replace(job, resolved=found.resolved), base, dataset, None, tmp_path, None)
    assert (planned.context_tokens, planned.prompt_tokens) == (64, 40)
    assert (planned.engine_address, planned.engine_base) == ("127.0.0.1:9000", "tiny")
    assert (planned.reinforcement.group_size, planned.reinforcement.temperature) == (8, 1.0)


def test_fields_become_the_prompt_that_their_task_makes_and_stay_what_the_grader_judges_by(
    read: Any, tokenizer: Any
) -> None:
    task = builtin("sentiment")
    row = {"review": "a fine film", "label": "positive"}
    options = {"method": Method.REINFORCEMENT, "task": task, "policy": OverLengthPolicy.TRUNCATE}
    (prompt,) = read([row], DatasetFormat.FIELDS, **options).prompts
    assert list(prompt.token_ids) == prompt_ids(to_prompt(task, row), tokenizer)[-CONTEXT_TOKENS:]
    assert dict(prompt.row) == row


def test_what_is_learned_from_waits_on_disk_and_not_in_memory(read: Any) -> None:
    rows = [{"text": "abcdefgh" * 500} for _ in range(100)]
    tokens = 100 * 4000
    read(rows[:1], DatasetFormat.TEXT, method=Method.SELF_SUPERVISED)  # what is imported is no part of it
    tracemalloc.start()
    try:
        prepared = read(rows, DatasetFormat.TEXT, method=Method.SELF_SUPERVISED)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert prepared.stats.tokens > tokens
    assert held < 2 * tokens  # in arrays they would be five bytes each, and each piece of 20 an object


def test_a_slice_an_index_from_the_end_and_one_out_of_range_are_those_of_a_sequence(read: Any) -> None:
    examples = _text(read, "ab", "cd", "ef").examples
    assert examples[-1] == examples[2] == list(examples)[2]
    assert examples[1:] == (examples[1], examples[2])
    with pytest.raises(IndexError):
        examples[3]
