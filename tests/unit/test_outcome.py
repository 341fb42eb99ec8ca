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
