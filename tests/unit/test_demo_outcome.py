import io
import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from graft.cli.demo import Outcome
from graft.cli.demo_outcome import as_json, print_outcome
from graft.cli.demo_report import report
from graft.evaluation.report import Contestant, LossPoint, Report, Task
from graft.stack.usage import Peak

REFERENCES = ("p", "n") * 20
BASE = Contestant("base, zero-shot", "base", ("p",) * 40, (1.0, 0.0) * 20, 1204.04)
ADAPTER = Contestant("adapter", "base:reviews@1", REFERENCES, (1.0,) * 40, None)


def _outcome(metric: str) -> Outcome:
    task = Task(
        "reviews",
        "Film reviews",
        metric,
        "a package",
        "MIT",
        ("input",) * 40,
        REFERENCES,
        (BASE, ADAPTER),
        (LossPoint(1, 2.0),),
        {"trained tokens": "31,204"},
        {"job": "j1"},
    )
    report = Report("Graft", "Better.", True, (task,), {"memory": "4 GB"}, {}, datetime(2026, 1, 1, tzinfo=UTC))
    return Outcome(report, Path("/reports/demo.html"), 61.0, Peak(4, 2))


def _printed(metric: str) -> str:
    console = Console(width=120, file=io.StringIO(), record=True)
    print_outcome(console, _outcome(metric))
    return console.export_text()


def test_the_table_the_gain_and_the_report_are_printed() -> None:
    text = _printed("accuracy")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "Film reviews, 40 held-out rows" in lines
    assert any(line.startswith("base, zero-shot 50.0% 35.0% to 65.0% 1204") for line in lines)
    assert "adapter 100.0% 100.0% to 100.0%" in lines
    assert "over base, zero-shot: +50.0 points (95% interval +35.0 to +65.0)" in lines
    assert "Report: /reports/demo.html" in lines


def test_scores_that_are_no_shares_are_plain_numbers() -> None:
    text = _printed("ROUGE-L")
    assert "over base, zero-shot: +0.500 (95% interval +0.350 to +0.650)" in text
    assert "0.350 to 0.650" in text


def test_the_json_holds_scores_advantage_and_memory() -> None:
    found = json.loads(json.dumps(as_json(_outcome("accuracy"))))
    (task,) = found["tasks"]
    assert task["contestants"][0]["score"]["mean"] == 0.5
    assert task["advantage"]["mean"] == 0.5
    assert found["peak_pss_bytes"] == {"stack": 4, "training_workers": 2}


def test_the_report_says_whether_the_first_adapter_wins_and_reaches_the_target() -> None:
    (found,) = _outcome("accuracy").report.tasks
    won = report([found], Peak(4_000_000_000, 2), 61.0)
    assert won.passed
    assert won.verdict == (
        "The reviews adapter beats the better prompt of its base (zero-shot) by +50.0 points (95% interval +35.0 to "
        "+65.0). The target of 15 points is reached."
    )
    assert won.stack["time, set-up aside"] == "0:01:01 (limit 0:10:00)"
    assert won.stack["memory of the stack"].startswith("4.0 GB")
    assert won.machine["cores"]
    lost = report([replace(found, contestants=(BASE, replace(BASE, name="adapter")))], Peak(4, 2), 61.0)
    assert not lost.passed
    assert "does not beat" in lost.verdict
    assert lost.verdict.endswith("The target of 15 points is missed.")
