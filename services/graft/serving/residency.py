"""Which adapters one engine holds: loading, counting requests in flight, eviction, unloading.

Owns the map from digest to vLLM's integer id. Does not know vLLM, Ray or the registry: the engine and the puller are
injected. Runs on one event loop; nothing here blocks.

An adapter is `loading`, then resident, then `leaving`. At most `capacity` adapters hold a slot (they are in the engine,
or are just entering or leaving it), so that vLLM never evicts one by itself: after such an eviction it reads the
adapter's folder again in the middle of a step, and an exception there ends the engine for everyone.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import structlog

from graft.domain.errors import GraftError, Unavailable

DIED = "The inference engine ended and is being replaced. Try again shortly."
RETRY_SECONDS = 2.0
"""A replacement is up after a few seconds: its process is forked from one that has imported everything."""
_log = structlog.get_logger("graft.serving")


@dataclass(frozen=True)
class Ref:
    """An immutable adapter version, and where to pull it from: `path`, or the registry when that is empty."""

    model: str
    digest: str
    registered_model: str = ""
    version: int = 0
    path: str = ""


class Engine(Protocol):
    """The part of the engine that residency needs."""

    async def add(self, name: str, int_id: int, path: Path) -> None:
        """Loads a proven adapter. Raises GraftError."""

    async def remove(self, name: str, int_id: int) -> None:
        """Takes an adapter out. Does nothing when the engine that held it has died."""


class Puller(Protocol):
    """Brings an adapter to this machine."""

    async def pull(self, ref: Ref) -> Path:
        """The folder with the proven files. Raises GraftError."""


@dataclass(frozen=True)
class Held:
    """One adapter as a replica holds it."""

    model: str
    digest: str
    in_engine: bool
    active_requests: int
    last_use_time: datetime


def engine_name(digest: str) -> str:
    """Name inside vLLM. Its prefix cache is keyed by it, so it is derived from the content and nothing else."""
    return f"graft-{digest.removeprefix('sha256:')[:32]}"


class _Entry:
    def __init__(self, ref: Ref, int_id: int) -> None:
        self.ref = ref
        self.name = engine_name(ref.digest)
        self.int_id = int_id
        self.path: Path | None = None
        self.loading: asyncio.Task[None]
        self.leaving: asyncio.Task[None] | None = None
        self.in_engine = False
        self.active = 0
        """Requests in flight, and those that wait for the load: neither may lose the adapter."""
        self.used = 0
        """Tick of the last use; a clock is too coarse to order requests by."""
        self.last_use_time = datetime.now(UTC)


class Residency:
    """The adapters of one engine. `capacity` is how many it can hold (vLLM's `max_cpu_loras`)."""

    def __init__(self, capacity: int, engine: Engine, puller: Puller) -> None:
        self.capacity = capacity
        self._engine = engine
        self._puller = puller
        self._entries: dict[str, _Entry] = {}
        self._slots_used = 0
        self._next_id = 1
        self._tick = 0
        self._engines = 0
        """Engines that have died: tells a load that it ended in a dead one."""
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def use(self, ref: Ref) -> AsyncIterator[str]:
        """Holds the adapter in the engine for one request, loading it first if need be; yields its engine name.

        Requests for one digest share one load, and its failure. Raises GraftError from the puller or the engine.
        """
        entry = await self._acquire(ref)
        try:
            yield entry.name
        finally:
            self._release(entry)

    async def load(self, ref: Ref) -> float:
        """Brings the adapter into the engine; returns the seconds that it took."""
        started = time.perf_counter()
        async with self.use(ref):
            return time.perf_counter() - started

    async def unload(self, digest: str) -> None:
        """Takes the adapter out after its requests in flight. Unknown digests are already out."""
        entry = self._entries.get(digest)
        if entry is None:
            return
        await asyncio.wait([entry.loading])
        if self._entries.get(digest) is entry:
            await asyncio.shield(self._leave(entry))

    def held(self) -> list[Held]:
        """Every adapter, the most recently used first."""
        return [
            Held(entry.ref.model, digest, entry.in_engine, entry.active, entry.last_use_time)
            for digest, entry in sorted(self._entries.items(), key=lambda item: -item[1].used)
        ]

    def engine_died(self) -> None:
        """Notes that the engine, and all that it held, is gone."""
        self._engines += 1
        for entry in self._entries.values():
            entry.in_engine = False

    async def restore(self) -> None:
        """Brings what the dead engine held into its replacement. One that fails is dropped, and loaded on demand.

        Raises Unavailable if the replacement dies as well.
        """
        for digest, entry in list(self._entries.items()):
            if entry.path is None or not entry.loading.done() or entry.leaving is not None or entry.in_engine:
                continue
            try:
                await self._engine.add(entry.name, entry.int_id, entry.path)
                entry.in_engine = True
            except Unavailable:
                raise
            except GraftError as error:
                _log.warning("adapter did not come back", model=entry.ref.model, error=error.message)
                if entry.leaving is None:  # else it is forgotten when it has left
                    self._forget(digest, holds_slot=True)
        self._notify()

    async def _acquire(self, ref: Ref) -> _Entry:
        while True:
            entry = self._entries.get(ref.digest)
            if entry is None:
                entry = self._start(ref)
            if entry.leaving is None:
                break
            await asyncio.wait([entry.leaving])
        entry.active += 1
        self._touch(entry)
        try:
            # Shielded: a client that goes away must not cancel the load that others wait for.
            await asyncio.shield(entry.loading)
        except BaseException:
            self._release(entry)
            raise
        return entry

    def _release(self, entry: _Entry) -> None:
        entry.active -= 1
        self._touch(entry)
        self._notify()

    def _touch(self, entry: _Entry) -> None:
        self._tick += 1
        entry.used = self._tick
        entry.last_use_time = datetime.now(UTC)

    def _start(self, ref: Ref) -> _Entry:
        # A fresh id for every load: vLLM may still know the id of an adapter that left.
        entry = _Entry(ref, self._next_id)
        self._next_id += 1
        self._entries[ref.digest] = entry
        entry.loading = self._spawn(self._load(entry))
        return entry

    async def _load(self, entry: _Entry) -> None:
        holds_slot = False
        try:
            entry.path = await self._puller.pull(entry.ref)
            await self._take_slot()
            holds_slot = True
            engines = self._engines
            await self._engine.add(entry.name, entry.int_id, entry.path)
            if engines != self._engines:
                raise Unavailable(DIED, reason="ENGINE_RESTARTING", retry_after_seconds=RETRY_SECONDS)
            entry.in_engine = True
            # Every request that waited may have gone, so nobody else tells those who wait for a slot.
            self._notify()
        except BaseException:
            self._forget(entry.ref.digest, holds_slot=holds_slot)
            raise

    async def _take_slot(self) -> None:
        """Waits for a free slot, making one if need be: idle adapters leave at once, the least recently used first.

        When all are busy, the least recently used one drains: requests for it wait until it has left and been loaded
        again. Without that, adapters under steady load would never be idle and a newcomer would wait for ever.
        """
        while self._slots_used >= self.capacity:
            staying = [entry for entry in self._entries.values() if entry.in_engine and entry.leaving is None]
            victim = min(staying, key=lambda entry: (entry.active > 0, entry.used), default=None)
            if victim is not None and victim.active == 0:
                await asyncio.wait([self._leave(victim)])
                continue
            if victim is not None and not any(entry.leaving for entry in self._entries.values()):
                self._leave(victim)
            await self._change()
        self._slots_used += 1

    def _leave(self, entry: _Entry) -> asyncio.Task[None]:
        if entry.leaving is None:
            entry.leaving = self._spawn(self._drain_and_remove(entry))
        return entry.leaving

    async def _drain_and_remove(self, entry: _Entry) -> None:
        while entry.active:
            await self._change()
        try:
            await self._engine.remove(entry.name, entry.int_id)
        finally:
            self._forget(entry.ref.digest, holds_slot=True)

    def _forget(self, digest: str, *, holds_slot: bool) -> None:
        del self._entries[digest]
        self._slots_used -= int(holds_slot)
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _change(self) -> None:
        await self._changed.wait()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        # Retrieved here too, since every request that waited may have gone.
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.info("adapter task failed", error=str(error))
