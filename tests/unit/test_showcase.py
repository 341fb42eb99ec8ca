"""Plans, progress and the page of showcases, and a run of one against a client that keeps what it is asked."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from showcase import page
from showcase.plans import LIMIT_SECONDS, PLANS, TOKENS_PER_SECOND, Derived, Plan, quick
from showcase.progress import Progress
from showcase.running import Run

from graft.api.v1 import dataset_pb2, deployment_pb2, evaluation_pb2, fine_tuning_job_pb2, fine_tuning_service_pb2
from graft.data.samples import Material
from graft.domain.errors import FailedPrecondition, NotFound
from graft.settings import load

ROOT = Path(__file__).resolve().parents[2]
Evaluation = evaluation_pb2.Evaluation
Job = fine_tuning_job_pb2.FineTuningJob


def material(_train: int, _heldout: int, _sources: object) -> Material:
    rows = tuple({"prompt": f"{number}", "completion": "x"} for number in range(10))
    return Material("toy", "A toy", "prompt_completion", rows[:8], rows[8:], "made up", "CC0-1.0")


def plan(**changes: Any) -> Plan:
    made = Plan("toy", "A toy", "Does it?", material, 8, 2, 4_000, ("accuracy",), "supervised", batch_size=4)
    return dataclasses.replace(made, **changes)


# Plans


@pytest.mark.parametrize("made", PLANS, ids=lambda made: made.name)
def test_a_plan_leaves_most_of_its_time_to_what_is_not_training(made: Plan) -> None:
    healing = made.derived.max_minutes * 60 if made.derived else 0
    assert made.token_budget / TOKENS_PER_SECOND + healing < LIMIT_SECONDS / 2
    small = quick(made)
    assert (small.n_train, small.n_heldout) == (32, 16)
    assert small.token_budget < made.token_budget


@pytest.mark.parametrize("tokens", [40, 1_000, 30_000])
def test_steps_stay_within_the_token_budget_and_the_epochs(tokens: int) -> None:
    made = plan()
    steps = made.steps(80, tokens, 4_000)
    assert 1 <= steps <= 20
    assert steps == 1 or steps * 4 * tokens / 80 <= 4_000
    assert plan(epochs=2.0).steps(80, 40, 4_000) == 40


def test_every_answer_of_a_group_counts_in_the_budget_of_reinforcement() -> None:
    made = plan(method="reinforcement", method_options={"group_size": 8}, max_tokens=16)
    # 4 prompts a step, of 10 tokens each, with 8 answers of up to 16 tokens: 832.
    assert made.steps(80, 800, 4_000) == 4


def test_make_has_a_target_for_every_showcase() -> None:
    named = re.search(r"^SHOWCASES := \$\(addprefix showcase-,(.*)\)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert named is not None
    assert named[1].split() == [made.name for made in PLANS]


# Progress


def test_progress_is_gone_on_from_only_by_the_same_plan(tmp_path: Path) -> None:
    path = tmp_path / "toy.json"
    first = Progress(path, {"rows": 1})
    asked = first.request_id("job")
    first.keep("train", "ds-1")
    first.spend("data", 2.0)
    again = Progress(path, {"rows": 1})
    assert (again.request_id("job"), again.get("train"), again.seconds) == (asked, "ds-1", {"data": 2.0})
    other = Progress(path, {"rows": 2})
    assert (other.get("train"), other.seconds) == ("", {})
    assert other.request_id("job") != asked


def test_a_damaged_record_of_progress_is_begun_again(tmp_path: Path) -> None:
    path = tmp_path / "toy.json"
    for damaged in ("", "{", "[]", '{"plan": 1}'):
        path.write_text(damaged)
        assert Progress(path, 1).get("train") == ""


# The page


def result(
    value: float, low: float, high: float, *, metric: str = "accuracy", name: str = "sentiment"
) -> dict[str, Any]:
    def figure(level: float) -> dict[str, Any]:
        return {"metric": metric, "value": level, "low": level - 0.1, "high": level + 0.1, "n": 9}

    def difference(baseline: str) -> dict[str, Any]:
        return {"baseline": baseline, "figure": {"metric": metric, "value": value, "low": low, "high": high, "n": 9}}

    return {
        "showcase": name,
        "title": f"On {name}",
        "asks": "Does it?",
        "caveat": "",
        "quick": False,
        "large": "base",
        "base": "base",
        "form": "supervised, LoRA, served as an adapter",
        "task": "sentiment",
        "data": {"source": "made up", "license": "CC0-1.0", "train_rows": 8, "heldout_rows": 9},
        "training": {"trained_tokens": 3_000, "token_budget": 4_000, "steps": 2, "hyperparameters": {"lora.rank": 8.0}},
        "seconds": {"job": 61.0, "evaluation": 30.0},
        "metrics": [metric],
        "results": [
            {"label": "base", "model": "base", "figures": [figure(0.5)]},
            {"label": "base, 8-shot", "model": "base", "figures": [figure(0.4)]},
            {
                "label": "base:toy@1",
                "model": "base:toy@1",
                "figures": [figure(0.5 + value)],
                "differences": [difference("base"), difference("base, 8-shot")],
            },
        ],
        "machine": {"cpu": "a processor", "cores": 2, "memory_gib": 8.0, "accelerators": "none"},
    }


@pytest.mark.parametrize(
    ("found", "outcome", "told"),
    [
        (result(0.2, 0.1, 0.3), "better", "Better than the best untuned answer (base): accuracy +20.0 points"),
        (result(-0.2, -0.3, -0.1), "worse", "It did not help: worse than base"),
        (result(0.1, -0.1, 0.3), "not shown", "No improvement is shown"),
        (result(-0.2, -0.3, -0.1, metric="perplexity"), "better", "base, 8-shot"),
        (result(0.2, 0.1, 0.3, metric="perplexity"), "worse", "It did not help"),
    ],
)
def test_a_result_is_told_as_it_is_against_the_best_untuned_prompt(
    found: dict[str, Any], outcome: str, told: str
) -> None:
    assert page.verdict(found).outcome == outcome
    section = page.section(found)
    assert told in section
    assert "3,000 of at most 4,000" in section


def test_a_new_result_replaces_its_section_and_leaves_what_people_wrote(tmp_path: Path) -> None:
    written = page.write(result(0.2, 0.1, 0.3), tmp_path)
    page.write(result(-0.2, -0.3, -0.1, name="dpo"), tmp_path)
    written.write_text(
        written.read_text().replace("<!-- /showcase:sentiment -->", "<!-- /showcase:sentiment -->\nWhy: luck.")
    )
    page.write(result(0.1, -0.1, 0.3), tmp_path)
    text = written.read_text()
    assert text.count("## On sentiment") == 1
    assert "+20.0 points" not in text
    assert "Why: luck." in text
    assert [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| [")] == [
        "[On sentiment](#on-sentiment)",
        "[On dpo](#on-dpo)",
    ]
    assert json.loads((tmp_path / "showcase" / "dpo.json").read_text())["title"] == "On dpo"


def test_a_page_that_lost_a_marker_is_not_overwritten(tmp_path: Path) -> None:
    written = page.write(result(0.2, 0.1, 0.3), tmp_path)
    damaged = written.read_text().replace("<!-- /showcase:sentiment -->", "")
    written.write_text(damaged)
    with pytest.raises(FailedPrecondition, match="Put it back"):
        page.write(result(0.2, 0.1, 0.3), tmp_path)
    assert written.read_text() == damaged


# A run


class Platform:
    """A client whose jobs and evaluations succeed at once, unless it is told to be interrupted."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.datasets: dict[str, dataset_pb2.Dataset] = {}
        self.jobs: dict[str, Job] = {}
        self.evaluations: dict[str, Evaluation] = {}
        self.interrupt = ""
        self.job_state = Job.STATE_SUCCEEDED

    def upload_dataset(self, path: Path, *, format: str) -> dataset_pb2.Dataset:
        self.calls.append(f"upload {path.stem} {format}")
        name = f"projects/default/datasets/ds-{len(self.datasets)}"
        rows = len(path.read_text().splitlines())
        return self.datasets.setdefault(name, dataset_pb2.Dataset(name=name, row_count=rows))

    def dataset(self, dataset: str) -> dataset_pb2.Dataset:
        for name, found in self.datasets.items():
            if name.endswith(f"/{dataset}"):
                return found
        raise NotFound(f"There is no data set {dataset}.", reason="NO_DATASET")

    def create_job(self, base: str, _train: str, *, request_id: str, suffix: str, **_: Any) -> Job:
        if request_id not in self.jobs:
            self.calls.append("job")
            name = f"projects/default/fineTuningJobs/ft-{len(self.jobs)}"
            job = Job(name=name, state=Job.STATE_RUNNING, base_model=base, suffix=suffix)
            self.jobs[request_id] = job
        return self._known(self.jobs[request_id])

    def watch_job(self, name: str) -> Any:
        if self.interrupt == "job":
            raise KeyboardInterrupt
        job = next(job for job in self.jobs.values() if job.name == name)
        job.state = self.job_state
        job.fine_tuned_model = f"{job.base_model}:{job.suffix}@1"
        job.end_time.GetCurrentTime()
        yield fine_tuning_service_pb2.WatchFineTuningJobResponse(fine_tuning_job=job)

    def job(self, name: str) -> Job:
        return self._known(next(job for job in self.jobs.values() if job.name.endswith(name)))

    def create_evaluation(
        self, _dataset: str, contestants: list[tuple[str, int]], *, request_id: str, **_: Any
    ) -> Evaluation:
        if request_id not in self.evaluations:
            self.calls.append(f"evaluation of {contestants}")
            made = Evaluation(name="projects/default/evaluations/ev-1", state=Evaluation.STATE_SUCCEEDED)
            for model, shots in contestants:
                made.results.add(label=model, model=model, shots=shots)
            self.evaluations[request_id] = made
        if self.interrupt == "evaluation":
            raise KeyboardInterrupt
        return self.evaluations[request_id]

    def evaluation(self, name: str) -> Evaluation:
        return next(found for found in self.evaluations.values() if found.name == name)

    def deploy_model(self, model: str) -> deployment_pb2.Deployment:
        self.calls.append(f"deploy {model}")
        if self.calls.count(f"deploy {model}") == 1:
            raise NotFound(f"There is no base model {model} yet.", reason="NO_BASE_MODEL")
        return deployment_pb2.Deployment(model=model, state=deployment_pb2.Deployment.STATE_READY)

    def undeploy_model(self, model: str) -> None:
        self.calls.append(f"undeploy {model}")

    def _known(self, job: Job) -> Job:
        copy = Job()
        copy.CopyFrom(job)
        return copy


@pytest.fixture
def showcase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("GRAFT_HOME", str(tmp_path))
    settings = load()
    # The base model is another test's: converting it takes half a minute.
    monkeypatch.setattr("showcase.running.ensure_base_model", lambda *_: None)
    monkeypatch.setattr("showcase.running.count_tokens", lambda *_: 80)

    def make(platform: Platform, **changes: Any) -> Run:
        client: Any = platform
        return Run(settings, client, Console(quiet=True), plan(**changes))

    return make


def test_an_interrupted_showcase_goes_on_from_the_step_that_it_was_in(showcase: Any) -> None:
    platform = Platform()
    for step in ("job", "evaluation"):
        platform.interrupt = step
        with pytest.raises(KeyboardInterrupt):
            showcase(platform).do()
    platform.interrupt = ""
    found = showcase(platform).do()
    assert platform.calls == [
        "upload toy-train prompt_completion",
        "upload toy-heldout prompt_completion",
        "job",
        "evaluation of [('smollm2-135m', 0), ('smollm2-135m:toy@1', 0)]",
    ]
    assert (found["training"]["steps"], found["training"]["token_budget"]) == (2, 4_000)
    assert found["results"][-1]["model"] == "smollm2-135m:toy@1"


def test_a_failed_job_is_made_again_by_the_next_run_from_the_same_data(showcase: Any) -> None:
    platform = Platform()
    platform.job_state = Job.STATE_FAILED
    with pytest.raises(FailedPrecondition, match="FAILED"):
        showcase(platform).do()
    platform.job_state = Job.STATE_SUCCEEDED
    showcase(platform).do()
    assert [call.split()[0] for call in platform.calls] == ["upload", "upload", "job", "job", "evaluation"]


def test_data_that_was_deleted_is_uploaded_again_and_trained_on_again(showcase: Any) -> None:
    platform = Platform()
    showcase(platform).do()
    platform.datasets.clear()
    showcase(platform).do()
    assert [call.split()[0] for call in platform.calls] == ["upload", "upload", "job", "evaluation"] * 2


def test_a_smaller_base_is_served_while_it_is_needed_and_compared_with_the_larger_one(
    showcase: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graft.registry.catalog.entries", lambda _settings: {"half": None})
    monkeypatch.setattr("showcase.running.POLL_SECONDS", 0.0)
    platform = Platform()
    changes = {"derived": Derived("half", 15, 1_000, 1.0), "shots": 4}
    for _ in range(2):  # what is done is told again, and nothing is served for that
        found = showcase(platform, **changes).do()
    assert platform.calls[2:] == [
        "deploy half",
        "deploy half",
        "job",
        "evaluation of [('smollm2-135m', 0), ('smollm2-135m', 4), ('half', 0), ('half:toy@1', 0)]",
        "undeploy half",
    ]
    assert (found["large"], found["base"]) == ("smollm2-135m", "half")


def test_another_plan_takes_nothing_over(showcase: Any) -> None:
    platform = Platform()
    showcase(platform).do()
    showcase(platform, token_budget=8_000).do()
    assert platform.calls.count("job") == 2


def test_a_showcase_past_its_limit_is_cancelled(showcase: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    platform: Any = Platform()
    cancelled: list[str] = []
    platform.cancel_job = cancelled.append
    monkeypatch.setattr("showcase.running.LIMIT_SECONDS", -1.0)
    with pytest.raises(FailedPrecondition, match="limit"):
        showcase(platform).do()
    assert cancelled == [job.name for job in platform.jobs.values()]
