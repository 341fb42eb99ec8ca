"""The store's promises about who leads, on SQLite and on a real PostgreSQL."""

import asyncio
from datetime import timedelta

import pytest

from graft.domain.deployments import DeploymentState
from graft.domain.errors import Aborted
from graft.domain.resources import RegistrySnapshot
from graft.store.sql import SqlStore

pytestmark = pytest.mark.integration
LEASE = timedelta(seconds=30)
OVER = timedelta(seconds=-1)
"""A lease that has run out by the time it is taken."""


async def test_of_many_that_ask_at_once_one_leads_and_goes_on(store: SqlStore) -> None:
    names = [f"orchestrator-{number}" for number in range(8)]
    taken = await asyncio.gather(*(store.take_lead(name, LEASE) for name in names))
    assert sum(taken) == 1
    assert [await store.take_lead(name, LEASE) for name in names] == taken


async def test_a_lead_is_free_once_it_is_given_back_or_has_run_out(store: SqlStore) -> None:
    assert await store.take_lead("first", LEASE)
    await store.give_lead_back("second")  # not its own
    assert not await store.take_lead("second", LEASE)
    await store.give_lead_back("first")
    assert await store.take_lead("second", OVER)
    assert await store.take_lead("third", LEASE)
    assert not await store.take_lead("second", LEASE)


async def test_who_leads_no_more_writes_nothing_that_only_the_leader_may(store: SqlStore) -> None:
    assert await store.take_lead("former", OVER)
    former = store.led_by("former")
    await former.replace_registry(RegistrySnapshot((), ()))  # nobody has taken it over yet
    assert await store.take_lead("next", LEASE)
    for write in (
        former.replace_base_models([]),
        former.replace_registry(RegistrySnapshot((), ())),
        former.finish_alias_wish("aw-1", None),
        former.finish_dataset_check("dc-1", None, None),
        former.move_deployment("other", DeploymentState.READY),
        former.remove_deployment("other"),
    ):
        with pytest.raises(Aborted, match="does not lead") as refusal:
            await write
        assert refusal.value.reason == "LEAD_LOST"
    await store.led_by("next").replace_base_models([])
