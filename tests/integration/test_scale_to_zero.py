"""A training cluster at zero: jobs make Ray's own autoscaler add the nodes that they ask for, and end them again.

The orchestrator's loop, its preparer and the runs are the real ones, registry and engine stand-ins, the GPU a number.
"""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from graft.domain.jobs import Hyperparameters, JobSpec, JobState
from graft.domain.resources import Dataset, DatasetFormat
from graft.orchestrator.preparer import TokenizingPreparer
from graft.training.run import RayRuns
from tests.support.adapters import tiny_base
from tests.support.growing_cluster import growing_cluster
from tests.support.orchestration import BASE, World, world
from tests.support.tiny_llama import make_tiny_llama

pytestmark = [pytest.mark.integration, pytest.mark.ray, pytest.mark.timeout(400)]

LABELLED = "labelled"
"""A base model whose workers have to be on nodes with a label; those of BASE are too large for these."""
GROUPS: dict[str, dict[str, Any]] = {
    "plain": {"resources": {"CPU": 4}, "labels": {"pool": "plain"}, "max_workers": 2},
    "large": {"resources": {"CPU": 1, "GPU": 1}, "labels": {"pool": "large"}, "max_workers": 1},
}
DECLARED = {
    "GRAFT_TRAINING_WORKER": json.dumps({"cpus": 2}),
    "GRAFT_TRAINING_POOLS": json.dumps({LABELLED: {"cpus": 1, "label_selector": {"pool": "large"}}}),
    "GRAFT_TRAINING_WORKER_GROUPS": json.dumps(
        {
            "plain": {"max_nodes": 2, "cpus": 4, "labels": {"pool": "plain"}},
            "large": {"max_nodes": 1, "cpus": 1, "gpus": 1, "labels": {"pool": "large"}},
        }
    ),
    "GRAFT_ORCHESTRATOR_POLL_SECONDS": "0.2",
    "GRAFT_ORCHESTRATOR_LEASE_SECONDS": "60",
}
PATIENCE_SECONDS = 120.0
"""Ray Train's own request of nodes would outlive a run that was ended by 180 s."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    with growing_cluster(tmp_path_factory.mktemp("growing"), GROUPS) as address:
        ray.init(address=address, namespace="elsewhere", log_to_driver=False)
        yield address
        ray.shutdown()


@asynccontextmanager
async def _orchestrated(runs: RayRuns, folder: Path) -> AsyncIterator[World]:
    async with world(folder / "home", **DECLARED) as it:
        preparer = TokenizingPreparer(training=it.parts.settings.training)
        limits = replace(it.parts.limits, unavailable_seconds=600.0, retry_seconds=0.5)
        it.parts = replace(it.parts, runs=runs, nodes=runs.nodes, preparer=preparer, limits=limits)
        it.engine.bases = {BASE, LABELLED}
        path = make_tiny_llama(folder / "base")
        await it.store.replace_base_models([replace(tiny_base(path), id=name) for name in (BASE, LABELLED)])
        rows = folder / "rows.jsonl"
        rows.write_text("".join(json.dumps({"prompt": f"{n} is ", "completion": "a number"}) + "\n" for n in range(20)))
        now = datetime.now(UTC)
        data = Dataset("rows", "default", "", DatasetFormat.PROMPT_COMPLETION, 20, 1, "sha256:r", str(rows), now)
        await it.store.create_dataset(data, None)
        it.close_gate(JobState.EVALUATING)  # who comes so far has trained, and given its nodes back
        async with it.orchestrator():
            yield it


async def _create(it: World, job_id: str, base: str) -> None:
    asked = Hyperparameters(max_steps=2, batch_size=4, num_workers=1)
    await it.store.create_job("default", job_id, JobSpec(base, "rows", hyperparameters=asked), None)


async def _wait(what: Callable[[], bool], told: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not await asyncio.to_thread(what):
        assert time.monotonic() < deadline, told()
        await asyncio.sleep(0.2)


def _nodes(runs: RayRuns) -> list[str]:
    """The groups of those that can train."""
    return sorted(node.labels["pool"] for node in runs.nodes() if node.resources.get("CPU"))


async def test_jobs_grow_a_cluster_at_zero_by_size_and_by_label_and_its_nodes_go_when_they_have_trained(
    cluster: str, tmp_path: Path
) -> None:
    import ray

    del cluster
    runs = RayRuns()
    async with _orchestrated(runs, tmp_path) as it:
        assert _nodes(runs) == []
        for base in (BASE, LABELLED):
            await _create(it, f"on-{base}", base)
        for base, asked in ((BASE, "1 x 2 CPU"), (LABELLED, "1 x 1 CPU on nodes with pool=large")):
            await it.until(f"on-{base}", JobState.EVALUATING, PATIENCE_SECONDS)
            told = [event.message for event in await it.events(f"on-{base}")]
            assert f"Waiting for nodes that have {asked}: Ray is asked for them, for up to 900 s." in told
        await _wait(lambda: _nodes(runs) == [], runs.nodes)
    # With those that have gone.
    assert sorted(node["Labels"]["pool"] for node in ray.nodes() if "pool" in node["Labels"]) == ["large", "plain"]


async def test_a_job_that_is_cancelled_while_it_waits_for_nodes_leaves_no_request_and_no_node(
    cluster: str, tmp_path: Path
) -> None:
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.util import placement_group_table

    def asked() -> list[object]:
        found = get_cluster_status(cluster).resource_demands
        return [*found.placement_group_demand, *found.ray_task_actor_demand, *found.cluster_constraint_demand]

    runs = RayRuns()
    async with _orchestrated(runs, tmp_path) as it:
        await _create(it, "on-second-thought", LABELLED)
        await _wait(lambda: asked() != [], placement_group_table)
        await it.store.request_cancel("default", "on-second-thought")
        await it.until("on-second-thought", JobState.CANCELLED, PATIENCE_SECONDS)
        await _wait(lambda: asked() == [], asked)
        await _wait(lambda: _nodes(runs) == [], runs.nodes)
