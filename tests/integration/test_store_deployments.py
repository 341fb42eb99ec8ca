"""The store's promises about deployments, on SQLite and on a real PostgreSQL."""

import asyncio
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from graft.domain.deployments import Deployment, DeploymentState
from graft.domain.errors import AlreadyExists, FailedPrecondition, NotFound
from graft.domain.jobs import JobError
from graft.store.sql import SqlStore

pytestmark = pytest.mark.integration
NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
WISH = Deployment("other", "default", "other", NOW)
ERROR = JobError("FAILED_PRECONDITION", "ENGINE_FAILED_TO_START", "No memory.")


async def test_a_repeated_wish_returns_the_deployment_that_there_is(store: SqlStore) -> None:
    later = replace(WISH, create_time=NOW + timedelta(hours=1))
    assert await store.create_deployment(WISH) == WISH
    made = await asyncio.gather(*(store.create_deployment(later) for _ in range(5)))
    assert set(made) == {WISH}
    assert await store.every_deployment() == (WISH,)


@pytest.mark.parametrize("other", [replace(WISH, project="theirs"), replace(WISH, source="base:full@2")])
async def test_an_id_that_means_another_model_is_refused(store: SqlStore, other: Deployment) -> None:
    await store.create_deployment(WISH)
    with pytest.raises(AlreadyExists, match="'other' is deployed already"):
        await store.create_deployment(other)


async def test_a_failed_deployment_keeps_its_reason_until_it_is_asked_for_again(store: SqlStore) -> None:
    await store.create_deployment(WISH)
    await store.move_deployment("other", DeploymentState.FAILED, ERROR)
    for state in (DeploymentState.STARTING, DeploymentState.READY, DeploymentState.FAILED):  # another orchestrator's
        assert not await store.move_deployment("other", state, replace(ERROR, message="It is gone."))
    failed = await store.find_deployment("other")
    assert failed == replace(WISH, state=DeploymentState.FAILED, error=ERROR)
    again = replace(WISH, create_time=NOW + timedelta(hours=1))
    assert await store.create_deployment(again) == again
    assert await store.get_deployment("default", "other") == again


async def test_a_wish_to_undeploy_outlasts_whatever_the_orchestrator_says_of_the_start(store: SqlStore) -> None:
    await store.create_deployment(WISH)
    await store.remove_deployment("other")  # not asked for
    assert (await store.request_undeploy("default", "other")).state is DeploymentState.STOPPING
    assert not await store.move_deployment("other", DeploymentState.READY)
    assert (await store.get_deployment("default", "other")).state is DeploymentState.STOPPING
    with pytest.raises(FailedPrecondition, match="still being undeployed"):
        await store.create_deployment(WISH)
    await store.remove_deployment("other")
    assert await store.find_deployment("other") is None


async def test_a_wish_is_answered_also_where_the_orchestrator_is_quicker(store: SqlStore) -> None:
    async def end() -> None:
        while await store.find_deployment("other") is not None:
            await store.remove_deployment("other")

    for _ in range(20):
        await store.create_deployment(WISH)
        stopping, _ = await asyncio.gather(store.request_undeploy("default", "other"), end())
        assert stopping == replace(WISH, state=DeploymentState.STOPPING)


async def test_a_wish_is_taken_also_where_the_last_one_of_its_id_ends_meanwhile(store: SqlStore) -> None:
    async def wish() -> None:
        for _ in range(40):
            with suppress(FailedPrecondition):  # it is on its way out
                assert await store.create_deployment(WISH) == WISH

    async def end() -> None:
        while not taken.is_set():
            with suppress(NotFound):
                await store.request_undeploy("default", "other")
            await store.remove_deployment("other")

    taken = asyncio.Event()
    ending = asyncio.create_task(end())
    await asyncio.gather(*(wish() for _ in range(3)))
    taken.set()
    await ending


async def test_deployments_are_a_projects_own(store: SqlStore) -> None:
    for name in ("b", "a", "c"):
        await store.create_deployment(replace(WISH, base_model=name, source=name))
    await store.create_deployment(replace(WISH, base_model="d", source="d", project="theirs"))
    first = await store.list_deployments("default", 2, "")
    second = await store.list_deployments("default", 2, first.next_page_token)
    assert [one.base_model for one in (*first.items, *second.items)] == ["a", "b", "c"]
    with pytest.raises(NotFound, match="Existing: a, b, c"):
        await store.get_deployment("default", "d")
    with pytest.raises(NotFound):
        await store.request_undeploy("default", "d")
