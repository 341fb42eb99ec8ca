"""Reinforcement with the real inference service: a policy that learns from what the engine samples of it."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from graft.domain.grading import GraderSpec
from graft.domain.jobs import Lora, Method, OverLengthPolicy, Reinforcement
from graft.domain.resources import DatasetFormat
from graft.internal.engine_client import EngineClient
from graft.internal.v1 import engine_pb2
from graft.training.objectives.objective import ALONE
from graft.training.spec import Clock, RunSpec
from graft.training.worker import run_worker
from tests.support.serving_stack import Stack, serving_stack
from tests.support.tiny_llama import make_tiny_llama

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

Told = list[tuple[str, dict[str, Any]]]
STEPS = 12


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with serving_stack(tmp_path_factory.mktemp("stack")) as stack:
        yield stack


@pytest.fixture
def spec(stack: Stack, tmp_path: Path) -> RunSpec:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Question {n}: "}) + "\n" for n in range(16)))
    return RunSpec(
        job_id="ft-7",
        attempt=1,
        base_model="tiny",
        base_model_path=str(make_tiny_llama(tmp_path / "base")),
        base_model_digest="sha256:b",
        dataset_path=str(data),
        dataset_format=DatasetFormat.GRADED_PROMPTS,
        validation_path=None,
        validation_format=None,
        output_dir=str(tmp_path / "run"),
        total_steps=STEPS,
        batch_size=8,
        learning_rate=2e-2,
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
            # One letter in eight tokens of 259: a chance of a few in a hundred at first.
            GraderSpec("regex", {"pattern": "[a-f]"}),
            group_size=8,
            max_completion_tokens=8,
            temperature=1.0,
            epsilon=0.2,
        ),
        engine_address=stack.settings.engine_address,
        project="default",
    )


def held(stack: Stack) -> list[engine_pb2.Resident]:
    async def ask() -> list[engine_pb2.Resident]:
        client = EngineClient(stack.settings.engine_address)
        try:
            return list((await client.residency()).replicas[0].adapters)
        finally:
            await client.close()

    return asyncio.run(ask())


def run(spec: RunSpec) -> Told:
    told: Told = []
    run_worker(spec, lambda kind, data: told.append((kind, data)), ALONE, lambda: 1, Clock())
    return told


def test_the_reward_rises_on_what_the_engine_samples_of_each_new_policy(spec: RunSpec, stack: Stack) -> None:
    told = run(spec)
    steps = [data for kind, data in told if kind == "metrics"]
    for step in steps:
        print({name: round(value, 3) for name, value in step.items() if isinstance(value, float)})
    first, last = (sum(step["reward"] for step in some) / 3 for some in (steps[:3], steps[-3:]))
    assert last > first + 0.3
    # Sampler and trainer compute in float32 here: their log-probabilities agree, of the base and of each adapter.
    assert all(step["sampler_ratio"] == pytest.approx(1, abs=1e-3) for step in steps if step["frac_zero_std"] < 1)
    assert not [resident.model for resident in held(stack) if "ft-7" in resident.model]
    assert not (Path(spec.output_dir) / "policy").exists()
    assert told[-1][0] == "finished"
