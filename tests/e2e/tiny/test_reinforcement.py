"""Reinforcement through the public door: the policy is sampled by the very service that serves the result."""

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from graft.api.v1.fine_tuning_job_pb2 import FineTuningJob
from graft.client import Graft
from graft.internal.engine_client import EngineClient
from graft.internal.token import engine_token
from graft.internal.v1 import engine_pb2
from tests.support.tiny_jobs import BASE, write_rows
from tests.support.tracked import curve
from tests.support.whole_stack import WholeStack, eventually

pytestmark = pytest.mark.e2e

ROWS: list[dict[str, object]] = [{"prompt": f"Number {number}?", "wanted": "e"} for number in range(16)]
REINFORCEMENT = {
    "grader": {"kind": "regex", "settings": {"pattern": "(e)", "field": "wanted"}},
    "group_size": 8,
    "max_completion_tokens": 16,
    "beta": 0.01,
}


def policies(stack: WholeStack, job: str) -> list[engine_pb2.Resident]:
    """What the engine holds of a job that is in no registry."""

    async def ask() -> list[engine_pb2.Resident]:
        client = EngineClient(stack.settings.engine_address, token=engine_token(stack.settings))
        try:
            found = (await client.residency()).replicas
        finally:
            await client.close()
        return [resident for replica in found for resident in replica.adapters if f"{job}-step-" in resident.model]

    return asyncio.run(ask())


def create(graft: Graft, folder: Path, steps: int, suffix: str) -> Any:
    data = graft.upload_dataset(write_rows(folder / "prompts.jsonl", ROWS))
    hyperparameters = {"max_steps": steps, "batch_size": 8, "learning_rate": 0.02}
    return graft.create_job(
        BASE,
        data.name,
        suffix=suffix,
        method="reinforcement",
        method_options=REINFORCEMENT,
        hyperparameters=hyperparameters,
    )


def test_a_policy_is_sampled_learns_and_is_served(stack: WholeStack, graft: Graft, tmp_path: Path) -> None:
    job = create(graft, tmp_path, 8, "letters")
    updates = list(graft.watch_job(job.name))
    job = updates[-1].fine_tuning_job
    assert job.state == FineTuningJob.STATE_SUCCEEDED, job.error
    assert job.fine_tuned_model == "tiny:letters@1"
    assert 0 <= job.metrics["train_reward"] <= 1
    assert job.metrics["parity_max_abs_difference"] < 0.05
    steps = [dict(update.event.data) for update in updates if update.event.type == "metrics"]
    for step in steps:
        assert {"reward", "reward_std", "kl", "clip_ratio", "rollout_seconds", "frac_zero_std"} <= step.keys()
        assert 1 <= step["completion_length"] <= 16
        assert step["rollout_tokens_per_second"] > 0
        assert math.isclose(step["sampler_ratio"], 1, abs_tol=0.01)
    assert policies(stack, job.name.rsplit("/", 1)[-1]) == []
    (version,) = graft.adapter_versions("tiny:letters")
    registry = MlflowClient(stack.settings.tracking_uri)
    assert [step for step, _ in curve(registry, version.mlflow_run_id, "reward")] == list(range(1, 9))


def test_a_cancelled_job_leaves_no_policy_in_the_engine(stack: WholeStack, graft: Graft, tmp_path: Path) -> None:
    job = create(graft, tmp_path, 10_000, "cancelled")
    name = job.name.rsplit("/", 1)[-1]
    eventually(lambda: policies(stack, name), bool, 120, "a policy is loaded")
    graft.cancel_job(job.name)
    *_, last = graft.watch_job(job.name)
    assert last.fine_tuning_job.state == FineTuningJob.STATE_CANCELLED
    assert policies(stack, name) == []
    assert not (stack.home / "runs" / name / "1" / "policy").exists()
