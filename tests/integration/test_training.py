"""Runs on a real Ray cluster of two nodes."""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from graft.domain.jobs import OverLengthPolicy
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
    ray.init(address=cluster.address, namespace="graft", log_to_driver=False)
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
        lora_rank=4,
        lora_alpha=8.0,
        lora_dropout=0.0,
        lora_target_modules=("q_proj", "v_proj", "down_proj"),
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


def test_one_worker_and_two_workers_on_two_nodes_follow_the_same_curve(runs: RayRuns, spec: RunSpec) -> None:
    curves = []
    for workers in (1, 2):
        mine = _named(spec, f"ft-workers-{workers}", num_workers=workers)
        runs.start(mine)
        runs.start(mine)
        reports = _wait(runs, mine)
        assert reports[-1].kind == "finished", reports[-1].data
        assert [report.sequence for report in reports] == list(range(1, len(reports) + 1))
        assert [report.data["step"] for report in reports if report.kind == "checkpoint"] == [5, 10]
        curves.append(_losses(reports))
        lines = (Path(mine.output_dir) / "reports.jsonl").read_text().splitlines()
        assert [json.loads(line)["kind"] for line in lines] == [report.kind for report in reports]
        assert not runs.poll(mine.job_id, 1, 0).alive
        runs.release(mine.job_id, 1)
    assert len(curves[0]) == 12
    assert curves[0][-1] < curves[0][0] - 0.3
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = Path(spec.output_dir) / "ft-workers-1" / "adapter"
    about = json.loads((folder / "graft.json").read_text())
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(spec.base_model_path), str(folder))
    assert len(about["probes"]) == 4
    for probe in about["probes"]:
        prompt, completion = probe["prompt_token_ids"], probe["completion_token_ids"]
        logprobs = loaded(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        scored = [float(logprobs[len(prompt) + n - 1, token]) for n, token in enumerate(completion)]
        assert sum(scored) / len(scored) == pytest.approx(probe["mean_logprob"], abs=1e-3)


def test_a_running_run_is_cancelled_at_once_and_its_workers_end(runs: RayRuns, spec: RunSpec) -> None:
    from ray.util.state import list_actors

    mine = _named(spec, "ft-cancel", total_steps=100_000)
    runs.start(mine)
    _wait(runs, mine, frozenset({"metrics"}))
    asked = time.monotonic()
    runs.cancel(mine.job_id, 1)
    assert _wait(runs, mine)[-1].kind == "cancelled"
    runs.release(mine.job_id, 1)
    while [actor for actor in list_actors() if actor.state == "ALIVE" and actor.ray_namespace == "graft"]:
        assert time.monotonic() - asked < 30
        time.sleep(0.2)
    assert not runs.poll(mine.job_id, 1, 0).exists


def test_a_failure_is_told_in_one_sentence_and_its_trace_kept(runs: RayRuns, spec: RunSpec) -> None:
    mine = _named(spec, "ft-fails", context_tokens=3)
    runs.start(mine)
    report = _wait(runs, mine)[-1]
    assert report.kind == "failed"
    assert "None of the 40" in report.data["message"]
    assert "Traceback" not in report.data["message"]
    assert "prepare" in (Path(mine.output_dir) / "error.log").read_text()
    runs.release(mine.job_id, 1)


def test_an_unknown_run_does_not_exist_and_may_be_cancelled_and_released(runs: RayRuns) -> None:
    assert not runs.poll("ft-unknown", 1, 0).exists
    runs.cancel("ft-unknown", 1)
    runs.release("ft-unknown", 1)
