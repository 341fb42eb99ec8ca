"""Which jobs may train on which nodes, what the others are told meanwhile, and how long nodes are waited for."""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from graft.domain.jobs import JobState
from graft.domain.placement import Node
from tests.support.orchestration import World, world

GPU_POOL = "{gpus: 1, label_selector: {pool: large}}"
GROUPS = "{cpu: {max_nodes: 2, cpus: 2}}"


async def _messages(it: World, job_id: str) -> list[str]:
    return [event.message for event in await it.events(job_id, "message")]


async def _told(it: World, job_id: str, text: str) -> None:
    """Waits until the job has been told something that holds the text."""
    async with asyncio.timeout(20):
        while not any(text in message for message in await _messages(it, job_id)):  # noqa: ASYNC110 - a row, no event
            await asyncio.sleep(0.01)


async def _train(it: World, *job_ids: str) -> None:
    """Has jobs train, one after the other: the gate of RUNNING keeps them there."""
    it.close_gate(JobState.RUNNING)
    for job_id in job_ids:
        await it.create_job(job_id, suffix=job_id)
        await it.until(job_id, JobState.RUNNING)


async def test_workers_that_ask_for_a_gpu_wait_for_one_whatever_cpus_are_free(tmp_path: Path) -> None:
    async with world(tmp_path, GRAFT_TRAINING_WORKER=GPU_POOL) as it:
        it.cluster = [Node({"CPU": 8.0}), Node({"CPU": 4.0, "GPU": 1.0}, {"pool": "large"})]
        async with it.orchestrator():
            await _train(it, "job-1")
            await it.create_job("job-2", suffix="b")
            await _told(it, "job-2", "Waiting for room to train: 1 x 1 CPU and 1 GPU on nodes with pool=large.")
            assert (await it.job("job-2")).state is JobState.QUEUED
            it.open_gate(JobState.RUNNING)
            await it.until("job-2", JobState.SUCCEEDED)
        assert it.runs.most_live == 1


async def test_a_younger_job_is_told_that_older_ones_go_first(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        it.cpus = 1
        async with it.orchestrator():
            await _train(it, "job-a")
            for name in ("b", "c"):
                await it.create_job(f"job-{name}", suffix=name)
                await it.until(f"job-{name}", JobState.QUEUED)
            await _told(it, "job-c", "Waiting for older jobs, which train first.")
            it.open_gate(JobState.RUNNING)
            await it.until("job-c", JobState.SUCCEEDED)
        assert len(set(await _messages(it, "job-c"))) == len(await _messages(it, "job-c"))


async def test_half_a_gpu_each_lets_two_jobs_share_one(tmp_path: Path) -> None:
    async with world(tmp_path, GRAFT_TRAINING_WORKER="{gpus: 0.5}") as it:
        it.cluster = [Node({"CPU": 8.0, "GPU": 1.0})]
        async with it.orchestrator():
            await _train(it, "job-a", "job-b")
            await it.create_job("job-c", suffix="c")
            await _told(it, "job-c", "0.5 GPU")
            assert (await it.job("job-c")).state is JobState.QUEUED


async def test_jobs_together_keep_within_their_share_and_one_that_is_beyond_it_is_refused(tmp_path: Path) -> None:
    async with world(tmp_path, GRAFT_TRAINING_SHARE="{CPU: 2}") as it:
        it.cpus = 8
        async with it.orchestrator():
            await _train(it, "job-a", "job-b")
            await it.create_job("job-c", suffix="c")
            await _told(it, "job-c", "Waiting for room")
            assert it.runs.most_live == 2
            it.preparer.workers = 3
            await it.create_job("job-wide", suffix="wide")
            error = (await it.until("job-wide", JobState.FAILED)).error
        assert error is not None
        assert error.reason == "DOES_NOT_FIT"
        assert "3 workers of 1 CPU, and jobs may hold 2 CPU (training.share)" in error.message


async def test_what_the_stacks_own_inference_declares_is_kept_for_it(tmp_path: Path) -> None:
    async with world(tmp_path, GRAFT_SERVING_REPLICA="{cpus: 3}") as it:
        it.cpus = 4
        async with it.orchestrator():
            await _train(it, "job-1")
            await it.create_job("job-2", suffix="b")
            await _told(it, "job-2", "Waiting for room")
            it.preparer.workers = 2
            await it.create_job("job-wide", suffix="wide")
            it.open_gate(JobState.RUNNING)
            error = (await it.until("job-wide", JobState.FAILED)).error
        assert error is not None
        assert "the cluster has 4 CPU, of which inference keeps 1 x 3 CPU" in error.message


async def test_a_job_that_the_cluster_may_grow_to_is_started_told_that_it_waits_and_trains(tmp_path: Path) -> None:
    async with world(tmp_path, GRAFT_TRAINING_WORKER_GROUPS=GROUPS) as it:
        it.cluster = [Node({"CPU": 0.0})]
        it.runs.placed = False
        it.close_gate(JobState.STARTING)
        it.preparer.workers = 4
        async with it.orchestrator():
            await it.create_job("job-1", suffix="a")
            await it.until("job-1", JobState.STARTING)
            await it.create_job("job-2", suffix="b")
            await _told(it, "job-1", "Waiting for nodes that have 4 x 1 CPU: Ray is asked for them, for up to 900 s.")
            assert (await it.job("job-1")).state is JobState.STARTING
            await _told(it, "job-2", "Waiting for room to train: 4 x 1 CPU.")
            it.runs.placed = True
            await _told(it, "job-1", "The workers have their nodes.")
            it.open_gate(JobState.STARTING)
            await it.until("job-1", JobState.SUCCEEDED)
            await it.until("job-2", JobState.SUCCEEDED)


async def test_a_job_that_is_too_wide_for_the_largest_cluster_is_refused(tmp_path: Path) -> None:
    async with world(tmp_path, GRAFT_TRAINING_WORKER_GROUPS=GROUPS) as it:
        it.cluster = [Node({"CPU": 2.0})]
        it.preparer.workers = 5
        await it.create_job("job-1")
        async with it.orchestrator():
            error = (await it.until("job-1", JobState.FAILED)).error
        assert error is not None
        assert error.reason == "DOES_NOT_FIT"
        assert "has 2 CPU, and 4 CPU at its largest (training.worker_groups)" in error.message


async def test_nodes_that_do_not_come_in_time_end_the_job_with_an_error_to_try_again(tmp_path: Path) -> None:
    limits = {"GRAFT_TRAINING_WORKER_GROUPS": GROUPS, "GRAFT_TRAINING_NODES_WAIT_SECONDS": "0.2"}
    async with world(tmp_path, **limits) as it:
        it.cluster = [Node({"CPU": 0.0})]
        it.runs.placed = False
        it.close_gate(JobState.STARTING)
        await it.create_job("job-1")
        async with it.orchestrator():
            error = (await it.until("job-1", JobState.FAILED)).error
        assert error is not None
        assert (error.code, error.reason) == ("UNAVAILABLE", "NO_NODES")
        assert "has not placed 1 x 1 CPU within 0.2 s (training.nodes_wait_seconds)" in error.message
        assert it.runs.released == [("job-1", 1)]


@pytest.mark.parametrize("groups", ["{}", GROUPS])
async def test_a_queued_job_waits_for_a_training_cluster_that_does_not_answer(tmp_path: Path, groups: str) -> None:
    async with world(tmp_path, GRAFT_TRAINING_WORKER_GROUPS=groups) as it:
        it.ray_away = True
        await it.create_job("job-1")
        async with it.orchestrator():
            await _told(it, "job-1", "Waiting for the training cluster: it does not answer, or has no CPUs yet.")
            assert (await it.job("job-1")).state is JobState.QUEUED
            it.ray_away = False
            await it.until("job-1", JobState.SUCCEEDED)


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("lost", ["head", "node"])
async def test_a_queued_job_waits_for_nodes_that_come_back_one_by_one(
    tmp_path: Path, lost: str, restarted: bool
) -> None:
    one = Node({"CPU": 1.0})
    async with world(tmp_path) as it:
        it.preparer.workers = 2
        it.cluster = [one, one]
        it.ray_away = lost == "head"
        async with AsyncExitStack() as orchestrators:
            await orchestrators.enter_async_context(it.orchestrator())
            if lost == "node":
                await _train(it, "job-1")
            await it.create_job("job-2", suffix="b")
            await _told(it, "job-2", "Waiting for room" if lost == "node" else "Waiting for the training cluster")
            if restarted:
                await orchestrators.aclose()
                await orchestrators.enter_async_context(it.orchestrator())
            it.ray_away = False
            it.cluster = [one]
            await asyncio.sleep(5 * it.parts.limits.never_fits_seconds)
            assert (await it.job("job-2")).state is JobState.QUEUED
            it.cluster = [one, one]
            it.open_gate(JobState.RUNNING)
            await it.until("job-2", JobState.SUCCEEDED)
