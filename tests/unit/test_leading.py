"""Of several orchestrators one works: who leads, what the others do meanwhile, and when another goes on."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from graft.domain.errors import InvalidArgument, Unavailable
from graft.domain.jobs import JobState
from graft.orchestrator import leading
from graft.orchestrator.leading import lead
from graft.orchestrator.loop import Orchestrator
from graft.store.protocol import Store
from graft.store.sql import SqlStore
from tests.support.orchestration import PROJECT, World, world

LASTING = timedelta(minutes=10)
"""No leader loses it, however busy the machine is."""
SHORT = timedelta(seconds=0.6)
"""Runs out while a test waits for it."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leading, "ASK_SECONDS", 0.01)


class _Link:
    """One process's way to the store; it can be cut, or what is sent on it held up."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.cut = False
        self.refuses = 0
        """So many times it does not answer."""
        self.held = 0
        """Times that the lead was taken or held."""
        self.through = asyncio.Event()
        self.through.set()
        self.answers = asyncio.Event()
        self.answers.set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def take_lead(self, owner: str, lease: timedelta) -> bool:
        await self.through.wait()
        self._check()
        taken = await self._store.take_lead(owner, lease)
        self.held += taken
        await self.answers.wait()
        return taken

    async def give_lead_back(self, owner: str) -> None:
        self._check()
        await self._store.give_lead_back(owner)

    def _check(self) -> None:
        if self.cut or self.refuses:
            self.refuses = max(self.refuses - 1, 0)
            raise Unavailable("The database does not answer.", reason="STORE_UNAVAILABLE")


class _Process:
    """What a process does: whether it works, or stands by."""

    def __init__(self, store: SqlStore, work: Callable[[str], Any] | None = None, lease: timedelta = LASTING) -> None:
        self.link = _Link(store)
        self.works = asyncio.Event()
        self.left = asyncio.Event()
        self.waits = asyncio.Event()
        self.terms: list[str] = []
        self._work = work
        self.task = asyncio.create_task(lead(self.link, lease, self._worked, self.waits.set))  # type: ignore[arg-type]

    async def _worked(self, owner: str) -> None:
        self.terms.append(owner)
        self.works.set()
        try:
            await (self._work(owner) if self._work else asyncio.Event().wait())
        finally:
            self.left.set()

    async def end(self) -> None:
        self.task.cancel()
        await asyncio.wait({self.task})


@asynccontextmanager
async def two(
    it: World, work: Callable[[str], Any] | None = None, lease: timedelta = LASTING
) -> AsyncIterator[tuple[_Process, _Process]]:
    first = _Process(it.store, work, lease)
    await first.works.wait()
    second = _Process(it.store, work, lease)
    await second.waits.wait()
    try:
        yield first, second
    finally:
        for one in (first, second):
            await one.end()


async def test_jobs_share_the_cluster_whichever_orchestrator_is_quicker_to_see_them(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        it.cpus = 1.0

        def work(owner: str) -> Any:
            return Orchestrator(replace(it.parts, store=it.store.led_by(owner)), owner).run()

        async with two(it, work):
            for number in range(12):
                await it.create_job(f"job-{number}", suffix=f"a{number}")
                await asyncio.sleep(0.01)
            for number in range(12):
                await it.until(f"job-{number}", JobState.SUCCEEDED)
        assert it.runs.most_live == 1


async def test_when_the_leader_ends_another_goes_on_at_once(tmp_path: Path) -> None:
    async with world(tmp_path) as it, two(it) as (first, second):
        assert not second.works.is_set()
        async with asyncio.timeout(60):
            await first.end()
            assert first.left.is_set()
            await second.works.wait()


async def test_one_that_is_told_to_end_while_it_takes_the_lead_leaves_it_to_another(tmp_path: Path) -> None:
    async with world(tmp_path) as it, two(it) as (first, second):
        second.link.answers.clear()
        await first.end()
        while not second.link.held:  # noqa: ASYNC110 - another task counts
            await asyncio.sleep(0.01)
        await second.end()
        assert not second.terms
        assert await it.store.take_lead("third", LASTING)


async def test_when_the_leader_is_not_heard_of_another_goes_on_and_it_has_stopped_by_then(tmp_path: Path) -> None:
    async with world(tmp_path) as it, two(it, lease=SHORT) as (first, second):
        first.link.cut = True
        await second.works.wait()
        assert first.left.is_set()
        first.link.cut = False
        await first.waits.wait()
        await second.end()
        while len(first.terms) < 2:  # noqa: ASYNC110 - another task counts
            await asyncio.sleep(0.01)
        assert len({*first.terms, *second.terms}) == 3  # no two terms have one owner


async def test_a_leader_that_was_held_up_works_no_more_once_it_knows_of_another(tmp_path: Path) -> None:
    async with world(tmp_path) as it, two(it, lease=SHORT) as (first, second):
        first.link.through.clear()
        await second.works.wait()
        first.link.through.set()
        await first.left.wait()
        assert not second.left.is_set()
        assert (await it.store.get_base_model("tiny")).id == "tiny"


async def test_a_leader_goes_on_when_the_store_is_away_for_a_moment(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        alone = _Process(it.store, lease=5 * SHORT)  # it asks once a second: this machine may be away for as long
        await alone.works.wait()
        alone.link.refuses, held = 2, alone.link.held
        while alone.link.held < held + 3:  # noqa: ASYNC110 - another task counts
            await asyncio.sleep(0.01)
        assert alone.link.refuses == 0
        assert len(alone.terms) == 1
        assert not alone.left.is_set()
        await alone.end()


async def test_what_the_work_fails_with_ends_the_process(tmp_path: Path) -> None:
    async def work(owner: str) -> None:
        raise InvalidArgument(f"{owner} cannot read the catalogue.", reason="INVALID_CATALOG")

    async with world(tmp_path) as it:
        failing = _Process(it.store, work)
        with pytest.raises(InvalidArgument, match="catalogue"):
            await failing.task
        next_one = _Process(it.store)
        await next_one.works.wait()
        await next_one.end()
        await it.create_job("job-1")
        assert (await it.store.get_job(PROJECT, "job-1")).lease_owner is None
