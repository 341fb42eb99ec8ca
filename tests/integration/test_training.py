"""Runs on a real Ray cluster of two nodes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from graft.domain.errors import Aborted
from graft.domain.jobs import Lora, OverLengthPolicy
from graft.domain.resources import DatasetFormat
from graft.training.run import RayRuns
from graft.training.spec import ENDS, Report, RunSpec
from tests.support.tiny_llama import make_tiny_llama

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def runs() -> Iterator[RayRuns]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 * 2**20})
    cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    # Not `graft`: a run's name must not depend on the namespace that its starter happens to be in.
    ray.init(address=cluster.address, namespace="elsewhere", log_to_driver=False)
    yield RayRuns()
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> RunSpec:
    folder = tmp_path_factory.mktemp("training")
    data = folder / "rows.jsonl"
    rows = [{"prompt": f"{n} is ", "completion": "even" if n % 2 == 0 else "odd"} for n in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RunSpec(
        job_id="ft-none",
        attempt=1,
        base_model="tiny",
        base_model_path=str(make_tiny_llama(folder / "base")),
        base_model_digest="sha256:b",
        dataset_path=str(data),
        dataset_format=DatasetFormat.PROMPT_COMPLETION,
        validation_path=str(data),
        validation_format=DatasetFormat.PROMPT_COMPLETION,
        output_dir=str(folder / "runs"),
        total_steps=12,
        batch_size=8,
        learning_rate=1e-2,
        warmup_ratio=0.1,
        weight_decay=0.0,
        max_grad_norm=1.0,
        context_tokens=64,
        seed=0,
        num_workers=1,
        checkpoint_steps=5,
        over_length_policy=OverLengthPolicy.DROP,
        lora=Lora(4, 8.0, 0.0, ("q_proj", "v_proj", "down_proj")),
    )


def _named(spec: RunSpec, job_id: str, **changes: Any) -> RunSpec:
    return replace(spec, job_id=job_id, output_dir=f"{spec.output_dir}/{job_id}", **changes)


def _wait(runs: RayRuns, spec: RunSpec, kinds: frozenset[str] = ENDS) -> list[Report]:
    deadline = time.monotonic() + 180
    reports: list[Report] = []
    while not reports or reports[-1].kind not in kinds:
        assert time.monotonic() < deadline, reports
        reports += runs.poll(spec.job_id, spec.attempt, len(reports)).reports
        time.sleep(0.1)
    return reports


def _losses(reports: list[Report]) -> list[float]:
    return [report.data["loss"] for report in reports if report.kind == "metrics"]


def _processes(word: str) -> set[int]:
    """Process ids of Ray's actors whose class has that name. Ray titles a process after what it runs."""
    found = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                title = (folder / "cmdline").read_bytes().decode(errors="replace")
            except OSError:  # it ended while we looked
                continue
            if title.startswith("ray::") and word in title:
                found.add(int(folder.name))
    return found


def test_one_worker_and_two_workers_on_two_nodes_follow_the_same_curve(runs: RayRuns, spec: RunSpec) -> None:
    curves, held_out = [], []
    for workers in (1, 2):
        mine = _named(spec, f"ft-workers-{workers}", num_workers=workers)
        runs.start(mine)
        runs.start(mine)
        reports = _wait(runs, mine)
        assert reports[-1].kind == "finished", reports[-1].data
        assert [report.sequence for report in reports] == list(range(1, len(reports) + 1))
        assert set(reports[0].data["startup_seconds"]) == {"worker_group", "imports", "data", "model"}
        assert [report.data["step"] for report in reports if report.kind == "checkpoint"] == [5, 10]
        assert all((Path(r.data["uri"]) / "adapter_model.safetensors").is_file() for r in reports if "uri" in r.data)
        metrics = [report.data for report in reports if report.kind == "metrics"]
        assert [item["step"] for item in metrics] == list(range(1, 13))
        assert [item["step"] for item in metrics if "validation_loss" in item] == [5, 10, 12]
        curves.append([item["loss"] for item in metrics])
        held_out.append(reports[-1].data["validation_loss"])
        lines = (Path(mine.output_dir) / "reports.jsonl").read_text().splitlines()
        assert [json.loads(line)["kind"] for line in lines] == [report.kind for report in reports]
        assert not runs.poll(mine.job_id, 1, 0).alive
        runs.release(mine.job_id, 1)
    assert curves[0][-1] < curves[0][0] - 0.3
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-3)

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = Path(spec.output_dir) / "ft-workers-1" / "adapter"
    assert sorted(file.name for file in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "graft.json",
    ]
    about = json.loads((folder / "graft.json").read_text())
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(spec.base_model_path), str(folder))
    assert len(about["probes"]) == 4
    for probe in about["probes"]:
        prompt, completion = probe["prompt_token_ids"], probe["completion_token_ids"]
        logprobs = loaded(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        scored = [float(logprobs[len(prompt) + n - 1, token]) for n, token in enumerate(completion)]
        assert sum(scored) / len(scored) == pytest.approx(probe["mean_logprob"], abs=1e-3)


FOLLOW = """
import json, sys, time
import ray
from graft.training.run import RayRuns
ray.init(address=sys.argv[1], namespace="graft", log_to_driver=False)
runs, seen = RayRuns(), []
while True:
    status = runs.poll(sys.argv[2], 1, len(seen))
    seen += status.reports
    if not status.alive and not status.reports:
        break
    time.sleep(0.05)
print(json.dumps([[report.sequence, report.kind] for report in seen]))
"""


def test_a_running_run_is_followed_to_its_end_from_another_process(runs: RayRuns, spec: RunSpec) -> None:
    import ray

    mine = _named(spec, "ft-adopted", total_steps=60, num_workers=2)
    runs.start(mine)
    first = runs.poll(mine.job_id, 1, 0)
    assert (first.exists, first.alive) == (True, True)
    address = ray.get_runtime_context().gcs_address
    found = subprocess.run(
        [sys.executable, "-c", FOLLOW, address, mine.job_id], capture_output=True, text=True, check=True, timeout=200
    )
    seen = json.loads(found.stdout.splitlines()[-1])
    assert [sequence for sequence, _ in seen] == list(range(1, len(seen) + 1))
    kinds = [kind for _, kind in seen]
    assert kinds.count("metrics") == 60
    assert (kinds[0], kinds[-1]) == ("started", "finished")
    runs.release(mine.job_id, 1)


def test_a_running_run_is_cancelled_and_all_its_processes_end_within_five_seconds(runs: RayRuns, spec: RunSpec) -> None:
    mine = _named(spec, "ft-cancel", total_steps=100_000)
    runs.start(mine)
    _wait(runs, mine, frozenset({"metrics"}))
    assert _processes("RayTrainWorker")
    asked = time.monotonic()
    runs.cancel(mine.job_id, 1)
    runs.cancel(mine.job_id, 1)
    assert _wait(runs, mine)[-1].kind == "cancelled"
    while _processes("RayTrainWorker") | _processes("TrainController"):
        assert time.monotonic() - asked < 5
        time.sleep(0.05)
    runs.release(mine.job_id, 1)
    while runs.poll(mine.job_id, 1, 0).exists:
        assert time.monotonic() - asked < 10
        time.sleep(0.05)


def test_a_later_attempt_ends_the_earlier_one_which_cannot_come_back(runs: RayRuns, spec: RunSpec) -> None:
    first = _named(spec, "ft-again", total_steps=100_000)
    second = replace(first, attempt=2, total_steps=2, output_dir=f"{first.output_dir}/2")
    runs.start(first)
    runs.start(second)
    assert _wait(runs, second)[-1].kind == "finished"
    assert not runs.poll(first.job_id, 1, 0).exists
    with pytest.raises(Aborted, match="superseded by attempt 2"):
        runs.start(first)
    runs.release(first.job_id, 2)


def test_a_failure_is_told_in_one_sentence_and_its_trace_kept(runs: RayRuns, spec: RunSpec) -> None:
    mine = _named(spec, "ft-fails", context_tokens=3, num_workers=2)
    runs.start(mine)
    report = _wait(runs, mine)[-1]
    assert (report.kind, report.data["code"], report.data["reason"]) == ("failed", "INVALID_ARGUMENT", "NO_EXAMPLES")
    assert report.data["message"].startswith("None of the 40")
    assert "prepare" in (Path(mine.output_dir) / "error.log").read_text()
    runs.release(mine.job_id, 1)


def test_a_killed_worker_fails_the_run_with_the_likely_cause(runs: RayRuns, spec: RunSpec) -> None:
    mine = _named(spec, "ft-killed", total_steps=100_000)
    runs.start(mine)
    _wait(runs, mine, frozenset({"metrics"}))
    for process in _processes("RayTrainWorker"):
        os.kill(process, signal.SIGKILL)
    report = _wait(runs, mine)[-1]
    assert (report.kind, report.data["reason"]) == ("failed", "WORKER_DIED"), report
    assert "memory" in report.data["message"]
    assert (Path(mine.output_dir) / "error.log").is_file()
    runs.release(mine.job_id, 1)


def test_an_unknown_run_does_not_exist_and_may_be_cancelled_and_released(runs: RayRuns) -> None:
    assert not runs.poll("ft-unknown", 1, 0).exists
    runs.cancel("ft-unknown", 1)
    runs.release("ft-unknown", 1)
