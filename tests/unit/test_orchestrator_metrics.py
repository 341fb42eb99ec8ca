"""What Prometheus reads of an orchestrator, through its door: jobs, leases, attempts, the mirror and the engine."""

import asyncio
import socket
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from graft.domain.errors import FailedPrecondition, GraftError, Internal, InvalidArgument, Unavailable
from graft.domain.jobs import JobState
from graft.internal.v1 import engine_pb2
from graft.orchestrator import metrics
from graft.settings import load
from graft.stack.processes import described
from tests.support.dashboards import metric_names
from tests.support.orchestration import FakeScorer, World, world
from tests.support.ports import free_port

Samples = dict[str, float]


async def read(port: int) -> Samples:
    """Every sample by its name with labels; none where nobody listens."""
    async with httpx.AsyncClient(timeout=20) as client:
        try:
            page = await client.get(f"http://127.0.0.1:{port}/metrics")
        except httpx.ConnectError:  # not yet
            return {}
    lines = [line for line in page.text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


async def read_until(port: int, accepted: Callable[[Samples], bool]) -> Samples:
    """What is measured comes after what has happened."""
    async with asyncio.timeout(20):
        while not (found := await read(port)) or not accepted(found):  # noqa: ASYNC110 - another's answer is awaited
            await asyncio.sleep(0.02)
    return found


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(metrics, "MEASURE_SECONDS", 0.02)
    return free_port()


def world_with_metrics(tmp_path: Path, port: int) -> AbstractAsyncContextManager[World]:
    return world(tmp_path, GRAFT_ORCHESTRATOR_METRICS_PORT=str(port))


def state(name: str) -> str:
    return f'graft_orchestrator_jobs{{state="{name}"}}'


def moves(name: str, reason: str = "") -> str:
    return f'graft_orchestrator_job_moves_total{{reason="{reason}",state="{name}"}}'


async def test_jobs_are_told_by_state_and_counted_as_they_move(tmp_path: Path, port: int) -> None:
    async with world_with_metrics(tmp_path, port) as it:
        it.close_gate(JobState.RUNNING)
        await it.create_job("job-1")
        async with it.orchestrator():
            await it.until("job-1", JobState.RUNNING)
            running = await read_until(port, lambda found: found.get(state("RUNNING")) == 1)
            assert running["graft_orchestrator_jobs_held"] == 1
            assert running[state("SUCCEEDED")] == 0
            it.open_gate(JobState.RUNNING)
            await it.until("job-1", JobState.SUCCEEDED)
            before = running.get(moves("SUCCEEDED"), 0)
            ended = await read_until(
                port,
                lambda found: found[state("SUCCEEDED")] == 1 and found.get(moves("SUCCEEDED"), 0) > before,
            )
    assert ended[state("RUNNING")] == 0
    assert ended[moves("SUCCEEDED")] - before == 1
    assert ended["graft_orchestrator_jobs_claimed_total"] >= 1


async def test_a_lost_attempt_and_a_failure_with_its_reason_are_counted(tmp_path: Path, port: int) -> None:
    async with world_with_metrics(tmp_path, port) as it, it.orchestrator():
        before = await read_until(port, bool)
        it.runs.lost_attempts = {1}
        await it.create_job("job-1")
        await it.until("job-1", JobState.SUCCEEDED)
        it.preparer.error = InvalidArgument("Line 3 is no row.", reason="BAD_DATASET")
        await it.create_job("job-2")
        await it.until("job-2", JobState.FAILED)
        # Counted after the row is written, by which the job is known to have failed.
        failed = moves("FAILED", "BAD_DATASET")
        after = await read_until(port, lambda found: found.get(failed, 0) > before.get(failed, 0))

    def more(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert more("graft_orchestrator_attempts_lost_total") == 1
    assert more(moves("STARTING")) == 2
    assert more(failed) == 1
    assert more(moves("FAILED", "INTERNAL")) == 0
    assert after[moves("FAILED", "INTERNAL")] >= 0  # there from the start, so that the first one is an increase


class _Away(FakeScorer):
    error: GraftError | None = None

    async def residency(self) -> engine_pb2.ResidencyResponse:
        if self.error is not None:
            raise self.error
        return await super().residency()


async def test_an_engine_that_is_away_and_one_that_is_back_are_told(tmp_path: Path, port: int) -> None:
    reachable, ready = "graft_orchestrator_engine_reachable", "graft_orchestrator_engine_replicas_ready"
    async with world_with_metrics(tmp_path, port) as it:
        engine = _Away(it.gates)
        it.parts = replace(it.parts, engine=engine)
        async with it.orchestrator():
            await read_until(port, lambda found: found[reachable] == 1 and found[ready] == 1)
            for error in (Unavailable("It is starting."), Internal("It failed.")):
                engine.error = error
                await read_until(port, lambda found: found[reachable] == 0 and found[ready] == 0)
                engine.error = None
                await read_until(port, lambda found: found[reachable] == 1)


async def test_passes_and_the_mirror_tell_when_they_were_last_well(tmp_path: Path, port: int) -> None:
    passed, mirrored = (
        "graft_orchestrator_last_pass_timestamp_seconds",
        "graft_orchestrator_registry_mirror_timestamp_seconds",
    )
    async with world_with_metrics(tmp_path, port) as it, it.orchestrator():
        first = await read_until(port, lambda found: found[mirrored] > 0)
        await read_until(port, lambda found: found[mirrored] > first[mirrored])
        it.registry.down = True
        stopped = await read(port)
        async with asyncio.timeout(20):
            while True:  # what it was asked before it went away may still come
                before, stopped = stopped, await _after_some_passes(port, stopped[passed])
                if stopped[mirrored] == before[mirrored]:
                    break
    assert stopped[passed] > stopped[mirrored]


async def _after_some_passes(port: int, last: float) -> Samples:
    name = "graft_orchestrator_last_pass_timestamp_seconds"
    return await read_until(port, lambda found: found[name] > last + 0.2)


async def test_an_orchestrator_exports_each_metric_that_rules_and_dashboard_ask_of_it(
    tmp_path: Path, port: int
) -> None:
    wanted = {name for name in metric_names() if name.startswith("graft_orchestrator_")}
    assert wanted
    async with world_with_metrics(tmp_path, port) as it, it.orchestrator():
        await read_until(port, lambda found: wanted <= {name.split("{")[0] for name in found})


async def test_a_taken_port_is_refused_with_the_setting_that_moves_it(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        async with world_with_metrics(tmp_path, taken.getsockname()[1]) as it:
            with pytest.raises(FailedPrecondition, match="GRAFT_ORCHESTRATOR_METRICS_PORT") as caught:
                async with it.orchestrator():
                    pytest.fail("It works where nobody can read how.")
    assert caught.value.reason == "PORT_TAKEN"


async def test_nothing_listens_unless_a_port_is_set_and_the_port_is_free_again_afterwards(
    tmp_path: Path, port: int
) -> None:
    assert load({"GRAFT_HOME": str(tmp_path)}).orchestrator.metrics_port == 0
    async with world_with_metrics(tmp_path, port) as it:
        for _ in range(2):
            async with it.orchestrator():
                await read_until(port, lambda found: found["graft_orchestrator_jobs_held"] == 0)


def test_the_stack_counts_the_port_among_its_own(tmp_path: Path) -> None:
    settings = load({"GRAFT_HOME": str(tmp_path), "GRAFT_ORCHESTRATOR_METRICS_PORT": "8081"})
    (orchestrator,) = [process for process in described(settings, {}) if process.name == "orchestrator"]
    assert [(port.number, port.setting) for port in orchestrator.ports] == [(8081, "GRAFT_ORCHESTRATOR_METRICS_PORT")]
