"""Evaluations of trained adapters and their base, asked through the engine that serves them."""

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.artifacts import list_artifacts

from graft.api.v1 import evaluation_pb2
from graft.client import Graft
from tests.support.method_jobs import TEXTS, Jobs, letters, preferences
from tests.support.tiny_jobs import BASE, write_rows
from tests.support.whole_stack import WholeStack, eventually

# The first test waits for all jobs of `jobs`: two minutes on two cores.
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


def evaluated(graft: Graft, data: str, models: list[str], **options: Any) -> list[evaluation_pb2.ContestantResult]:
    """The results of an evaluation, over gRPC."""
    made = graft.create_evaluation(data, models, **options)
    done = eventually(
        lambda: graft.evaluation(made.name), lambda now: now.HasField("end_time"), 120, "the evaluation ends"
    )
    assert done.state == done.STATE_SUCCEEDED, done.error.message
    assert done.answered_requests == done.total_requests > 0
    return list(done.results)


def values(results: list[evaluation_pb2.ContestantResult], metric: str) -> list[float]:
    found = [figure for result in results for figure in result.figures if figure.metric == metric]
    assert all(figure.low <= figure.value <= figure.high and figure.n > 0 for figure in found)
    return [figure.value for figure in found]


def test_the_command_compares_base_few_shot_and_adapters_and_writes_the_report(
    stack: WholeStack, jobs: Jobs, tmp_path: Path
) -> None:
    held_out = write_rows(tmp_path / "held-out.jsonl", letters(24, first=100))
    full, last = jobs.model("full"), jobs.model("last")
    report = tmp_path / "report.html"
    done = stack.graft(
        *("compare", str(held_out), BASE, full, last, "--shots=4", f"--shots-from={jobs.data['all']}"),
        *(f"--report={report}", "--name=Letters", "--json"),
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["state"] == "STATE_SUCCEEDED"
    results = {result["label"]: result for result in told["results"]}
    assert list(results) == [BASE, f"{BASE}, 4-shot", full, last]
    accuracies = {
        label: figure["value"]
        for label, result in results.items()
        for figure in result["figures"]
        if figure["metric"] == "accuracy"
    }
    assert accuracies[full] > accuracies[BASE]
    for result in results.values():
        assert sum(result["confusion"]["counts"]) == 24
        assert result["tokens_per_second"] > 0
        assert 0 < result["latency_p50_seconds"] <= result["latency_p95_seconds"]
    assert {one["baseline"] for one in results[full]["differences"]} == {BASE, f"{BASE}, 4-shot", last}
    assert told["verdicts"]
    page = report.read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert full in page

    evaluation_id = told["name"].rsplit("/", 1)[-1]
    shown = stack.graft("evaluations", "get", evaluation_id)
    assert shown.returncode == 0, shown.stderr
    assert "Letters" in shown.stdout
    assert f"{BASE}, 4-shot" in shown.stdout

    run = MlflowClient(stack.settings.tracking_uri).get_run(told["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert sorted(accuracies.values()) == sorted(
        value for name, value in run.data.metrics.items() if name.endswith("/accuracy")
    )
    files = list_artifacts(run_id=run.info.run_id, tracking_uri=stack.settings.tracking_uri)
    assert "report.html" in {file.path for file in files}


def test_a_preference_adapter_ranks_pairs_that_it_has_not_seen_better_than_its_base(
    graft: Graft, jobs: Jobs, tmp_path: Path
) -> None:
    data = graft.upload_dataset(write_rows(tmp_path / "pairs.jsonl", preferences(12, first=50)))
    wins = values(evaluated(graft, data.name, [BASE, jobs.model("pairs")]), "win_rate")
    assert wins[1] == 1.0
    assert wins[1] > wins[0]


def test_text_that_was_learned_has_a_lower_perplexity_than_for_the_base(
    graft: Graft, jobs: Jobs, tmp_path: Path
) -> None:
    texts: list[dict[str, object]] = [{"text": f"{word} is what {word} does. " * 6} for word in ("black", "five")]
    assert texts[0] not in TEXTS
    data = graft.upload_dataset(write_rows(tmp_path / "texts.jsonl", texts))
    results = evaluated(graft, data.name, [BASE, jobs.model("texts")])
    for metric in ("perplexity", "bits_per_byte"):
        base, tuned = values(results, metric)
        assert tuned < 0.97 * base


def test_written_answers_are_compared_word_by_word_and_letter_by_letter(
    graft: Graft, jobs: Jobs, tmp_path: Path
) -> None:
    data = graft.upload_dataset(write_rows(tmp_path / "written.jsonl", letters(16, first=300)))
    metrics = ["exact_match", "token_f1", "rouge_1", "rouge_l", "chrf"]
    # A space and a digit, at a byte a token.
    results = evaluated(graft, data.name, [BASE, jobs.model("full")], metrics=metrics, max_tokens=2)
    for metric in metrics:
        base, tuned = values(results, metric)
        assert base < tuned <= (100 if metric == "chrf" else 1), metric
    # Of answers of one word, to be the word and to overlap with it is the same.
    assert values(results, "exact_match")[1] == values(results, "token_f1")[1] == values(results, "rouge_l")[1]


def test_answers_are_graded_by_their_number_and_counted_as_passes(graft: Graft, jobs: Jobs, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"prompt": row["prompt"], "answer": int(row["completion"])} for row in letters(16, first=200)
    ]
    data = graft.upload_dataset(write_rows(tmp_path / "graded.jsonl", rows), format="graded_prompts")
    results = evaluated(
        graft,
        data.name,
        [BASE, jobs.model("full")],
        grader={"kind": "numeric", "settings": {"field": "answer"}},
        metrics=["pass_at_1", "pass_at_5"],
        samples=5,
        max_tokens=4,
    )
    base, tuned = values(results, "pass_at_1")
    assert 0 <= base < tuned <= 1
    # Of five tries at a temperature, one passes more often than the first.
    assert all(one <= five for one, five in zip((base, tuned), values(results, "pass_at_5"), strict=True))
    assert values(results, "pass_at_5")[1] > tuned or tuned == 1


def test_a_prompt_that_does_not_fit_is_told_and_one_that_leaves_too_little_room_is_answered(
    graft: Graft, tmp_path: Path
) -> None:
    context_tokens = next(model.context_tokens for model in graft.base_models() if model.name.endswith(f"/{BASE}"))
    # The tiny tokenizer gives a byte a token.
    prompts = ["letter", "x" * (context_tokens - 4), "x" * (context_tokens + 40)]
    rows: list[dict[str, object]] = [{"prompt": prompt, "completion": " y"} for prompt in prompts]
    data = graft.upload_dataset(write_rows(tmp_path / "long.jsonl", rows))
    made = graft.create_evaluation(data.name, [BASE], metrics=["exact_match"], max_tokens=16)
    done = eventually(
        lambda: graft.evaluation(made.name), lambda now: now.HasField("end_time"), 120, "the evaluation ends"
    )
    assert done.state == done.STATE_SUCCEEDED, done.error.message
    assert any(f"{BASE} has no answer to 1 of 3 questions" in verdict for verdict in done.verdicts)
