"""Which orchestrator works: one leads, by the store's lease, and the others stand by until it ends or is not heard of.

What an orchestrator decides it decides by all that is there: which jobs still fit on the nodes, what the registry
holds, which engines run. Of two that did so at once each would give away the same room. Does not know the work.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import timedelta

import structlog

from graft.domain.errors import Aborted, GraftError, Unavailable
from graft.orchestrator.loop import owner_name
from graft.orchestrator.metrics import LAST_PASS
from graft.store.protocol import Store

log = structlog.get_logger()

ASK_SECONDS = 1.0
"""How often one that stands by asks: after a leader that ends as it should, nobody leads for as long at most."""
JOBS_LEASES = 4 / 3
"""The lead's lease, in leases of jobs. All are renewed after a third of the latter: those of a leader that has died
have run out when the next one begins, which then knows of every job that trains before it lets another in."""
TURNS = 4
"""Renewals in a lease: two may fail before the leader stops, and another begins a turn later."""

Work = Callable[[str], Awaitable[None]]
"""Works as the owner of that name, until cancelled."""


async def lead(store: Store, jobs_lease: timedelta, work: Work, stands_by: Callable[[], None]) -> None:
    """Until cancelled, or until `work` ends: works whenever this process leads, under a new name each time.

    `stands_by` is called whenever another turns out to lead. Raises what `work` raises.
    """
    lease = jobs_lease * JOBS_LEASES
    away = waits = False
    while True:
        owner = owner_name()
        asked = time.monotonic()
        try:
            leads = await store.take_lead(owner, lease)
        except Unavailable as error:
            if not away:
                away = True
                log.warning("store_unavailable", error=error.message)
            await asyncio.sleep(ASK_SECONDS)
            continue
        except asyncio.CancelledError:  # it may have been taken all the same
            with suppress(GraftError):
                await store.give_lead_back(owner)
            raise
        away = False
        LAST_PASS.set_to_current_time()
        if leads:
            waits = False
            log.info("leads", owner=owner)
            if await _lead(store, owner, lease, asked, work):
                return
        elif not waits:
            waits = True
            log.info("stands_by", owner=owner)
            stands_by()
        await asyncio.sleep(ASK_SECONDS)


async def _lead(store: Store, owner: str, lease: timedelta, asked: float, work: Work) -> bool:
    """Works as long as `owner` leads; true when the work has ended by itself."""
    working = asyncio.ensure_future(work(owner))
    lost: bool | None = None
    error: BaseException | None = None
    try:
        lost = await _hold(store, owner, lease, asked, working)
    finally:
        working.cancel()
        await asyncio.wait({working})
        if not working.cancelled() and (error := working.exception()) and lost is not False:
            log.warning("work_left", owner=owner, error=str(error), kind=type(error).__name__)
        with suppress(GraftError):  # the lease runs out
            await store.give_lead_back(owner)
    if error is not None and not lost and not isinstance(error, Aborted):
        raise error
    return not lost and error is None


async def _hold(store: Store, owner: str, lease: timedelta, asked: float, working: "asyncio.Future[None]") -> bool:
    """Until the work ends, or the lead is lost, which it then tells. `asked`: when the lead was taken."""
    turn_seconds = lease.total_seconds() / TURNS
    while True:
        await asyncio.wait({working}, timeout=turn_seconds)
        if working.done():
            return False
        asking = time.monotonic()
        # A turn before the lease ends, since work takes a moment to end.
        until = asked + (TURNS - 1) * turn_seconds
        try:
            # Never less than a turn: a process that was held up asks before it gives up, and mostly leads still.
            async with asyncio.timeout(max(until - asking, turn_seconds)):
                leads = await store.take_lead(owner, lease)
        except (Unavailable, TimeoutError):
            leads = time.monotonic() < until
        else:
            asked = asking
        if not leads:
            log.warning("lead_lost", owner=owner)
            return True
