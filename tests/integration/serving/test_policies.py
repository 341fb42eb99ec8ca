"""Reinforcement with the real inference service: a policy that learns from what the engine samples of it."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from graft.domain.errors import InvalidArgument
from graft.domain.grading import GraderSpec
from graft.domain.jobs import Lora, Method, OverLengthPolicy, Reinforcement
from graft.domain.resources import DatasetFormat
from graft.internal.token import VARIABLE, token_file
from graft.training.batching import batches
from graft.training.objectives.objective import ALONE
from graft.training.spec import Clock, RunSpec
from graft.training.worker import run_worker
from tests.support.serving_stack import Stack

pytestmark = [pytest.mark.integration, pytest.mark.ray, pytest.mark.timeout(400)]

Told = list[tuple[str, dict[str, Any]]]
STEPS = 12


@pytest.fixture
def spec(stack: Stack, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunSpec:
    # As on a node of the stack's own Ray cluster.
    monkeypatch.setenv(VARIABLE, str(token_file(stack.settings)))
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Question {n}: "}) + "\n" for n in range(16)))
    return RunSpec(
        job_id="ft-7",
        attempt=1,
        base_model="tiny",
        base_model_path=str(base),
        base_model_digest="sha256:tiny",
        dataset_path=str(data),
        dataset_format=DatasetFormat.GRADED_PROMPTS,
        validation_path=None,
        validation_format=None,
        output_dir=str(tmp_path / "run"),
        total_steps=STEPS,
        batch_size=8,
        learning_rate=1e-2,
        warmup_ratio=0.0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        context_tokens=64,
        seed=0,
        num_workers=1,
        checkpoint_steps=100,
        over_length_policy=OverLengthPolicy.FAIL,
        lora=Lora(8, 16.0, 0.0, ("q_proj", "v_proj", "o_proj", "down_proj")),
        method=Method.REINFORCEMENT,
        reinforcement=Reinforcement(
            # One of six letters in four tokens of 320: a chance of a few in a hundred at first.
            GraderSpec("regex", {"pattern": "[a-f]"}),
            group_size=8,
            max_completion_tokens=4,
            temperature=1.0,
            epsilon=0.2,
        ),
        engine_address=stack.settings.engine_address,
        engine_base="tiny",
        project="default",
    )


def policies(stack: Stack) -> list[str]:
    """Names of the ephemeral adapters that the engine holds."""

    async def ask() -> list[str]:
        client = stack.client()
        try:
            (replica,) = (await client.residency()).replicas
            return [resident.model for resident in replica.adapters if "ft-7" in resident.model]
        finally:
            await client.close()

    return asyncio.run(ask())


def seed_that_ends_with(index: int, count: int) -> int:
    """A seed whose first epoch, in steps of one row, comes to this row last."""
    return next(seed for seed in range(100) if list(batches(count, 1, count, seed))[-1] == [index])


def run(spec: RunSpec) -> Told:
    told: Told = []
    run_worker(spec, lambda kind, data: told.append((kind, data)), ALONE, lambda: 1, Clock())
    return told


def test_the_reward_rises_on_what_the_engine_samples_of_each_new_policy(spec: RunSpec, stack: Stack) -> None:
    told = run(spec)
    steps = [data for kind, data in told if kind == "metrics"]
    first, last = (sum(step["reward"] for step in some) / 3 for some in (steps[:3], steps[-3:]))
    assert last > first + 0.5, [step["reward"] for step in steps]
    # Sampler and trainer both compute in float32: they agree on the base, and on the policy after each update.
    compared = [step["sampler_ratio"] for step in steps if step["frac_zero_std"] < 1]
    assert len(compared) > 3
    assert compared == pytest.approx([1.0] * len(compared), abs=1e-3)
    assert all(step["rollout_tokens_per_second"] > 0 and 1 <= step["completion_length"] <= 4 for step in steps)
    (_, finished) = next(item for item in reversed(told) if item[0] == "finished")
    assert finished["train_reward"] == steps[-1]["reward"]
    about = json.loads((Path(spec.output_dir) / "adapter" / "graft.json").read_text())
    assert len(about["probes"]) == 4
    assert policies(stack) == []
    assert not (Path(spec.output_dir) / "policy").exists()


def test_a_run_that_fails_leaves_no_policy_in_the_engine(spec: RunSpec, stack: Stack) -> None:
    grader = GraderSpec("exact_match", {"field": "answer"})
    rows = [{"prompt": "a", "answer": "b"}] * 3 + [{"prompt": "c"}]
    Path(spec.dataset_path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    held: list[list[str]] = []

    def tell(_kind: str, _data: dict[str, Any]) -> None:
        held.append(policies(stack))

    asked = replace(spec.reinforcement, grader=grader)
    failing = replace(spec, reinforcement=asked, batch_size=1, total_steps=4, seed=seed_that_ends_with(3, 4))
    with pytest.raises(InvalidArgument, match="needs the field 'answer'"):
        run_worker(failing, tell, ALONE, lambda: 1, Clock())
    assert [len(found) for found in held] == [0, 0, 1, 1], "the base, and then one policy at a time"
    assert policies(stack) == []
    assert not (Path(spec.output_dir) / "policy").exists()
