"""Two orchestrators, as in a cluster, carry out the same deployments: what one has decided the other leaves alone."""

import asyncio
from dataclasses import dataclass
from datetime import timedelta
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


async def test_an_orchestrator_that_leads_no_more_ends_no_engine_of_the_one_that_does(tmp_path: Path) -> None:
    over = timedelta(seconds=-1)
    async with scene(tmp_path) as on:

        async def refresh() -> None: ...

        assert await on.it.store.take_lead("former", over)
        former = Deployments(on.it.store.led_by("former"), on.service, on.models, refresh, on.settings, 0.01)
        on.service.slow.add(BASE)
        await on.wish(BASE)
        await former.reconcile()
        while BASE not in on.service.there:  # noqa: ASYNC110 - another task starts it
            await asyncio.sleep(0.01)
        assert await on.it.store.take_lead("next", over)
        on.service.slow.clear()
        await asyncio.wait(former._starting.values())
        assert BASE in on.service.there
        assert not on.service.ending
        async with on.running():
            await on.until(BASE, DeploymentState.READY)
