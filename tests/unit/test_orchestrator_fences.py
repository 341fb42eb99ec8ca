"""An orchestrator that has fallen behind: what it does not know of, and what it must not do any more."""

import asyncio
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from graft.domain.errors import Unavailable
from graft.domain.jobs import Job, JobState
from graft.orchestrator import steps
from tests.support.orchestration import PATIENCE_SECONDS, world


async def test_an_owner_that_has_not_noticed_the_loss_of_its_lease_starts_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharing, shared = threading.Event(), threading.Event()

    def share_slowly(*_: object) -> None:
        sharing.set()
        shared.wait(PATIENCE_SECONDS)

    async with world(tmp_path) as it:
        monkeypatch.setattr(steps, "share_base_model", share_slowly)
        await it.create_job("job-1")
        async with it.orchestrator() as first:
            while not sharing.is_set():  # noqa: ASYNC110 - a thread sets it
                await asyncio.sleep(0.01)
            mine = await it.store.leased_jobs(first.owner)

            async def as_it_was(_owner: str) -> tuple[Job, ...]:
                return mine

            monkeypatch.setattr(it.store, "leased_jobs", as_it_was)
            claim = it.store.claim_jobs
            monkeypatch.setattr(it.store, "claim_jobs", _claim_nothing)
            taken: tuple[Job, ...] = ()
            while not taken:  # a claim of the first owner may have been under way
                await it.store.release_leases(first.owner)
                taken = await claim("another", timedelta(seconds=60), 1)
            shared.set()
            await asyncio.sleep(0.3)
        assert it.runs.starts == []


async def _claim_nothing(*_: object) -> tuple[Job, ...]:
    return ()


async def test_no_report_of_the_next_attempt_is_skipped_when_the_move_to_it_was_made_but_not_heard_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path) as it:
        it.runs.lost_attempts = {1}
        transition = it.store.transition

        async def unheard(*given: Any, **named: Any) -> Job:
            moved = await transition(*given, **named)
            if named["next_attempt"]:
                raise Unavailable("The connection was cut.", reason="STORE_UNAVAILABLE")
            return moved

        monkeypatch.setattr(it.store, "transition", unheard)
        await it.create_job("job-1")
        async with it.orchestrator():
            assert (await it.until("job-1", JobState.SUCCEEDED)).attempt == 2
        told = [event.data for event in await it.events("job-1") if "report" in event.data]
        assert [data["report"] for data in told if data["attempt"] == 2] == [1, 2, 3, 4, 5, 6]
