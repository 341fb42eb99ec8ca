"""Keeps one engine alive: starts it, notices its death at once, replaces it and brings its adapters back.

Knows residency and an engine's protocol; does not know vLLM or Ray. The engine lives inside the replica, because a new
replica would pay Ray's and vLLM's start-up again, while a new engine process costs seconds.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import structlog

from graft.domain.errors import Unavailable
from graft.serving.residency import DIED, RETRY_SECONDS, Residency

_log = structlog.get_logger("graft.serving")

POLL_SECONDS = 0.05
"""vLLM tells a death by a flag only. Twenty reads of it a second cost nothing."""
MAX_BACKOFF_SECONDS = 30.0
START_ATTEMPTS = 3
"""Who waits for the first engine is told why there is none after as many: about a minute of backing off."""


class KeptEngine(Protocol):
    """What the keeper needs of an engine."""

    @property
    def dead(self) -> bool:
        """True once it cannot answer any more."""

    async def add(self, name: str, int_id: int, path: Path) -> None:
        """Loads an adapter."""

    async def remove(self, name: str, int_id: int) -> None:
        """Takes an adapter out."""

    def close(self) -> None:
        """Ends it. Blocks."""


EngineT = TypeVar("EngineT", bound=KeptEngine)


class Keeper(Generic[EngineT]):
    """The engine that there is, if there is one; also residency's engine, across replacements."""

    def __init__(self, build: Callable[[], Awaitable[EngineT]]) -> None:
        self._build = build
        self._engine: EngineT | None = None
        self._ready = False
        self._failure = ""
        self._failures = 0
        self.restarts = 0
        """Engines replaced after they died."""

    @property
    def ready(self) -> bool:
        """True while requests are answered."""
        return self._ready and self._engine is not None and not self._engine.dead

    @property
    def start_error(self) -> str:
        """Why the last attempt to start an engine failed; empty once one has started."""
        return self._failure

    def engine(self) -> EngineT:
        """The engine. Raises Unavailable with a retry hint while there is none."""
        if self._engine is not None and self.ready:
            return self._engine
        if self._failure:
            raise Unavailable(
                f"The inference engine does not start: {self._failure}",
                reason="ENGINE_FAILED_TO_START",
                retry_after_seconds=MAX_BACKOFF_SECONDS,
            )
        if self.restarts or self._ready:
            raise Unavailable(DIED, reason="ENGINE_RESTARTING", retry_after_seconds=RETRY_SECONDS)
        raise Unavailable(
            "The inference engine is starting. Try again shortly.",
            reason="ENGINE_STARTING",
            retry_after_seconds=RETRY_SECONDS,
        )

    async def started(self) -> None:
        """Returns once requests are answered. Raises Unavailable, with the reason, after START_ATTEMPTS in vain."""
        while not self.ready:
            if self._failures >= START_ATTEMPTS:
                self.engine()
            await asyncio.sleep(POLL_SECONDS)

    async def add(self, name: str, int_id: int, path: Path) -> None:
        """Residency's `add`. Raises Unavailable while there is no engine."""
        if self._engine is None:
            self.engine()
        else:
            await self._engine.add(name, int_id, path)

    async def remove(self, name: str, int_id: int) -> None:
        """Residency's `remove`: a dead engine holds nothing."""
        if self._engine is not None:
            await self._engine.remove(name, int_id)

    async def run(self, residency: Residency) -> None:
        """Keeps an engine until it is cancelled."""
        while True:
            started = time.perf_counter()
            try:
                self._engine = await self._build()
                await residency.restore()
            # Whatever vLLM raises at start, the next attempt may succeed: memory frees up, a disk empties.
            except Exception as error:  # noqa: BLE001
                self._failures += 1
                self._failure = str(error).splitlines()[0] if str(error) else type(error).__name__
                _log.error("engine did not start", attempt=self._failures, exc_info=error)
                await self._discard(residency)
                await asyncio.sleep(min(MAX_BACKOFF_SECONDS, 2.0**self._failures))
                continue
            self._failures, self._failure, self._ready = 0, "", True
            _log.info("engine ready", seconds=round(time.perf_counter() - started, 1), restarts=self.restarts)
            while not self._engine.dead:  # noqa: ASYNC110  # vLLM has a flag and no event
                await asyncio.sleep(POLL_SECONDS)
            self.restarts += 1
            _log.error("engine died; replacing it", restarts=self.restarts)
            await self._discard(residency)

    async def close(self) -> None:
        """Ends the engine, after `run` was cancelled."""
        engine, self._engine, self._ready = self._engine, None, False
        if engine is not None:
            await asyncio.to_thread(engine.close)

    async def _discard(self, residency: Residency) -> None:
        residency.engine_died()
        await self.close()
