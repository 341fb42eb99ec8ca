"""`graft models deploy` and `undeploy` against a real gateway: followed to the end, whichever it is."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from graft.domain.deployments import DeploymentState
from graft.domain.jobs import JobError, ServedAs
from graft.domain.resources import RegistrySnapshot
from tests.support.command import ended, graft, started, waiting
from tests.support.gateways import BASE, Gateway, gateway, registry

FULL = f"{BASE}-whole-3"


@asynccontextmanager
async def with_a_full_model(tmp_path: Path) -> AsyncIterator[Gateway]:
    """A gateway that knows the full model `whole@3`."""
    async with gateway(tmp_path) as it:
        version = replace(registry().versions[-1], adapter="whole", served_as=ServedAs.MERGED_MODEL)
        adapter = replace(registry().adapters[0], adapter="whole")
        await it.store.replace_registry(RegistrySnapshot((adapter,), (version,)))
        yield it


async def wished(it: Gateway, state: DeploymentState) -> None:
    """Waits until somebody has asked for it."""
    async with asyncio.timeout(20):
        while (found := await it.store.find_deployment(FULL)) is None or found.state is not state:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_deploy_follows_a_model_until_it_is_ready(tmp_path: Path) -> None:
    async with with_a_full_model(tmp_path) as it:
        running = asyncio.create_task(graft("models", "deploy", f"{BASE}:whole", GRAFT_ADDRESS=it.address))
        await wished(it, DeploymentState.STARTING)
        await it.store.move_deployment(FULL, DeploymentState.READY)
        ran = await running
        assert (ran.code, ran.err) == (0, "")
        assert f"{FULL} is ready. Try it: graft chat {FULL}" in ran.out
        listed, as_json = await asyncio.gather(
            graft("models", "deployments", GRAFT_ADDRESS=it.address),
            graft("models", "deployments", "--json", GRAFT_ADDRESS=it.address),
        )
        assert listed.out.splitlines()[1].split()[:3] == [FULL, f"{BASE}:whole@3", "ready"]
        assert as_json.json[0]["state"] == "STATE_READY"


async def test_deploy_ends_with_the_reason_of_a_failure(tmp_path: Path) -> None:
    async with with_a_full_model(tmp_path) as it:
        running = asyncio.create_task(graft("models", "deploy", f"{BASE}:whole", GRAFT_ADDRESS=it.address))
        await wished(it, DeploymentState.STARTING)
        why = JobError("RESOURCE_EXHAUSTED", "NOT_ENOUGH_MEMORY", "It takes 9.0 GiB, and 3.1 GiB are available.")
        await it.store.move_deployment(FULL, DeploymentState.FAILED, why)
        ran = await running
        assert ran.code == 1
        assert ran.err == f"{FULL} is not served: {why.message}\n"


async def test_undeploy_waits_until_it_has_ended(tmp_path: Path) -> None:
    async with with_a_full_model(tmp_path) as it:
        detached = await graft("models", "deploy", f"{BASE}:whole", "--detach", GRAFT_ADDRESS=it.address)
        assert detached.code == 0
        assert "graft models deployments" in detached.out
        running = asyncio.create_task(graft("models", "undeploy", FULL, GRAFT_ADDRESS=it.address))
        await wished(it, DeploymentState.STOPPING)
        assert not running.done()
        await it.store.remove_deployment(FULL)
        assert (await running).out == f"{FULL} is no longer served.\n"
        again = await graft("models", "undeploy", FULL, "--json", GRAFT_ADDRESS=it.address)
        assert (again.code, again.error["reason"]) == (3, "DEPLOYMENT_NOT_FOUND")


async def test_ctrl_c_leaves_a_deployment_going_and_says_how_to_end_it(tmp_path: Path) -> None:
    async with with_a_full_model(tmp_path) as it:
        process = await started("models", "deploy", f"{BASE}:whole", GRAFT_ADDRESS=it.address)
        await wished(it, DeploymentState.STARTING)
        await waiting(process)
        process.send_signal(signal.SIGINT)
        ran = await ended(process)
        assert ran.code == 130
        assert f"graft models undeploy {FULL}" in ran.err
        found = await it.store.find_deployment(FULL)
        assert found is not None
        assert found.state is DeploymentState.STARTING
