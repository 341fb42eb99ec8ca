"""Two orchestrators, as in a cluster, carry out the same deployments: what one has decided the other leaves alone."""

import asyncio
from dataclasses import dataclass
from pathlib import Path

from graft.domain.deployments import DeploymentState
from graft.domain.errors import Unavailable
from graft.internal.v1 import engine_pb2
from graft.orchestrator.deployments import Deployments
from tests.support.orchestration import BASE
from tests.unit.test_deployments import FakeService, scene


@dataclass
class _SlowToTell(FakeService):
    """The same service over a link by which engines are never heard of."""

    async def residency(self) -> engine_pb2.ResidencyResponse:
        raise Unavailable("Its door opens after a moment.", reason="ENGINE_STARTING")


async def test_the_reason_of_a_failure_is_that_of_the_orchestrator_which_saw_it(tmp_path: Path) -> None:
    async with scene(tmp_path) as on:
        on.service.start_error = "No memory."

        async def refresh() -> None: ...

        slow = _SlowToTell(on.it.engine, on.service.there)
        other = Deployments(on.it.store, slow, on.models, refresh, on.settings, 0.01)
        await on.wish(BASE)
        await other.reconcile()
        while BASE not in on.service.there:  # noqa: ASYNC110 - the other one has begun
            await asyncio.sleep(0.01)
        async with on.running():
            await on.until(BASE, DeploymentState.FAILED)
            await asyncio.wait(other._starting.values())
            failed = await on.it.store.find_deployment(BASE)
        assert failed is not None
        assert failed.error is not None
        assert failed.error.reason == "ENGINE_FAILED_TO_START"
