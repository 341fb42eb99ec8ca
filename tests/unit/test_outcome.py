"""From the answers of an evaluation to what is stored of it."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from graft.data.questions import read_questions
from graft.domain.evaluations import Contestant
from graft.domain.resources import Dataset, DatasetFormat
from graft.evaluation.outcome import Measured, Subject, compare, results_of
from graft.orchestrator.asking import Answer

NOW = datetime(2026, 11, 25, tzinfo=UTC)


def test_questions_without_an_answer_are_counted_and_are_in_no_latency(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f'{{"prompt": "{n}?", "completion": "{n}"}}\n' for n in range(4)))
    questions = read_questions(file, DatasetFormat.PROMPT_COMPLETION)
    answers = (
        Answer(0, ("0",), generated_tokens=1, seconds=2.0),
        Answer(1, ("",), seconds=0.001, unanswered="The prompt has 9 tokens, and the context 8."),
        Answer(2, ("",), seconds=0.001, unanswered="The prompt has 9 tokens, and the context 8."),
        Answer(3, ("3",), generated_tokens=1, seconds=4.0),
    )
    measured = [Measured(Subject("base", "base", False, 1000, 2000), answers, (), 5.0)]
    dataset = Dataset("ds", "default", "Rows", DatasetFormat.PROMPT_COMPLETION, 4, 40, "sha256:d", str(file), NOW)
    found = compare(questions, ("exact_match",), measured, title="Rows", dataset=dataset, created=NOW)
    (result,) = results_of(found, [Contestant("base")], measured)
    assert (result.figures[0].value, result.figures[0].n) == (0.5, 4)
    assert (result.latency_p50_seconds, result.latency_p95_seconds) == (3.0, pytest.approx(3.9))
    assert (result.tokens_per_second, result.unanswered_count) == (0.4, 2)


@pytest.mark.parametrize(("metrics", "paired"), [(("perplexity",), False), ((), True)])
def test_models_of_two_tokenizers_are_compared_by_bytes_and_not_by_tokens(
    tmp_path: Path, metrics: tuple[str, ...], paired: bool
) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "Once upon"}\n{"text": "a time"}\n')
    questions = read_questions(file, DatasetFormat.TEXT)
    measured = [
        Measured(
            Subject(name, name, tuned, 1000, 2000),
            tuple(Answer(row, nats=(nats,), scored_tokens=tokens) for row in range(2)),
            (),
            1.0,
        )
        for name, tuned, nats, tokens in (("base", False, 9.0, 3), ("base:mine@1", True, 8.0, 5))
    ]
    dataset = Dataset("ds", "default", "Texts", DatasetFormat.TEXT, 2, 40, "sha256:d", str(file), NOW)
    found = compare(questions, metrics or questions.metrics, measured, title="Texts", dataset=dataset, created=NOW)
    results = results_of(found, [Contestant("base"), Contestant("base:mine@1")], measured)
    assert [len(result.figures) for result in results] == ([2, 2] if paired else [1, 1])
    assert [len(result.differences) for result in results] == ([1, 1] if paired else [0, 0])
    said = " ".join((found.headline, *found.remarks))
    assert ("beats base" in said, "whose tokenizers differ" in said) == (paired, not paired)
