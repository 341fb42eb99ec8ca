"""`graft compare` and `graft evaluations`, through the real command and gateway; the orchestrator's part is played."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from graft.domain.evaluations import (
    Confusion,
    Contestant,
    ContestantResult,
    Difference,
    Evaluation,
    EvaluationState,
    Figure,
)
from graft.domain.jobs import JobError
from tests.support.command import Ran, graft
from tests.support.gateways import BASE, ROWS, Gateway, gateway
from tests.unit.test_gateway_jobs import uploaded

LEASE = timedelta(seconds=30)
ADAPTER = f"{BASE}:reviews@3"
REPORT = b"<!doctype html><p>The report."


async def ran(it: Gateway, *arguments: str | Path) -> Ran:
    return await graft(*arguments, GRAFT_ADDRESS=it.address)


def result(contestant: Contestant, value: float, against: dict[str, float]) -> ContestantResult:
    return ContestantResult(
        contestant.label,
        contestant.model,
        contestant.shots,
        (Figure("accuracy", value, value - 0.05, value + 0.05, 300),),
        tuple(
            Difference(label, Figure("accuracy", value - other, value - other - 0.02, value - other + 0.02, 300))
            for label, other in against.items()
        ),
        0.25,
        0.75,
        90.0,
        135_000_000,
        270_000_000,
        Confusion(("bad", "good"), (120, 30, 0, 20, 130, 0)),
        unanswered_count=3,
    )


@asynccontextmanager
async def played(it: Gateway, state: EvaluationState) -> AsyncIterator[None]:
    """Takes the next evaluation to that end."""

    async def work() -> None:
        found: Evaluation | None = None
        while found is None:
            found = await it.store.claim_evaluation("test", LEASE)
            await asyncio.sleep(0.01)
        if state is EvaluationState.FAILED:
            error = JobError("FAILED_PRECONDITION", "QUESTION_REFUSED", "The question is too long.")
            await it.store.end_evaluation(found, "test", state, error=error)
            return
        values = [0.5 + 0.1 * place for place in range(len(found.spec.contestants))]
        labels = [one.label for one in found.spec.contestants]
        results = [
            result(one, value, {label: v for label, v in zip(labels, values, strict=True) if label != one.label})
            for one, value in zip(found.spec.contestants, values, strict=True)
        ]
        folder = it.settings.evaluation_dir("default", found.id)
        folder.mkdir(parents=True)
        (folder / "report.html").write_bytes(REPORT)
        verdicts = ["It wins.", "It has no answer to 3 of 300 questions."]
        await it.store.end_evaluation(found, "test", state, results=results, verdicts=verdicts, mlflow_run_id="r-1")

    task = asyncio.create_task(work())
    try:
        yield
        await task
    finally:
        task.cancel()


async def test_compare_uploads_a_file_adds_few_shot_bases_and_shows_who_wins(tmp_path: Path) -> None:
    rows, report = tmp_path / "held-out.jsonl", tmp_path / "reports" / "mine.html"
    rows.write_bytes(ROWS)
    async with gateway(tmp_path) as it:
        learned = "".join(f'{{"prompt": "{n}?", "completion": "yes"}}\n' for n in range(8))
        train = (await uploaded(it, learned.encode())).rsplit("/", 1)[1]
        async with played(it, EvaluationState.SUCCEEDED):
            options = ["--shots", "8", "--shots-from", train, "--metric", "accuracy", "--report", report]
            shown = await ran(it, "compare", rows, BASE, f"{BASE}:reviews", *options)
        (stored,) = (await it.store.list_evaluations("default", 10, "")).items
        assert [(one.model, one.shots) for one in stored.spec.contestants] == [(BASE, 0), (BASE, 8), (ADAPTER, 0)]
        assert (stored.spec.metrics, stored.spec.shots_dataset) == (("accuracy",), train)
        assert shown.code == 0, shown.err
        assert f"{rows} is uploaded as data set {stored.spec.dataset}." in shown.out
        assert "70.0%" in shown.out
        assert f"{BASE}, 8-shot" in shown.out
        assert f"{ADAPTER} beats {BASE}, 8-shot" in shown.out
        assert "Answers of" in shown.out
        assert shown.out.count("It has no answer to 3 of 300 questions.") == 1
        assert "MLflow run r-1" in shown.out
        assert report.read_bytes() == REPORT

        unwritten = await ran(it, "evaluations", "get", stored.id, "--report", rows / "below" / "a-file.html")
        assert unwritten.code == 2
        assert "70.0%" in unwritten.out
        assert "a-file.html cannot be written: Not a directory." in unwritten.err

        again = await ran(it, "evaluations", "get", stored.id, "--json")
        assert again.json["results"][2]["figures"][0]["value"] == pytest.approx(0.7)
        listed = await ran(it, "evaluations", "list")
        assert stored.id in listed.out
        assert "succeeded" in listed.out
        ended = await ran(it, "evaluations", "cancel", stored.id)
        assert (ended.code, "already ended" in ended.err) == (2, True)


async def test_a_comparison_that_fails_says_why_and_exits_with_an_error(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        dataset = (await uploaded(it)).rsplit("/", 1)[1]
        async with played(it, EvaluationState.FAILED):
            shown = await ran(it, "compare", dataset, f"{BASE}/0", "--json")
        assert shown.code == 2
        assert shown.error["reason"] == "EVALUATION_NOT_SUCCEEDED"
        assert "has ended as failed: The question is too long." in shown.error["message"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((f"{BASE}/many",), "write MODEL, or MODEL/8"),
        ((f"{BASE}/99999999999",), "contestants: "),
        ((BASE, "--metric", "acuracy"), "'acuracy' is not a metric"),
        ((BASE, "--shots", "4"), "shots_dataset: is required"),
        ((BASE, "--task", "sentiment", "--set", "grader.field=x"), "without --grader"),
    ],
)
async def test_a_wrong_comparison_is_refused_in_a_sentence(
    tmp_path: Path, arguments: tuple[str, ...], told: str
) -> None:
    async with gateway(tmp_path) as it:
        dataset = (await uploaded(it)).rsplit("/", 1)[1]
        refused = await ran(it, "compare", dataset, *arguments)
        assert refused.code == 2
        assert told in refused.err
