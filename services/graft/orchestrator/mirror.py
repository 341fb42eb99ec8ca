"""The read model of the registry: MLflow's aliases and versions copied into the store, and alias wishes carried out.

MLflow is the truth. While it is down the store keeps what it last said; wishes wait. Told once in the log, and once
when it is back.
"""

import asyncio
import time

import structlog

from graft.domain.errors import GraftError, Unavailable
from graft.domain.jobs import JobError
from graft.domain.names import CHAMPION
from graft.domain.resources import AdapterVersion, RegistrySnapshot
from graft.orchestrator.metrics import LAST_MIRROR
from graft.orchestrator.ports import RegistryPort
from graft.orchestrator.threads import call, to_the_end
from graft.store.protocol import AliasWish, Store

log = structlog.get_logger()


class Mirror:
    """Copies one way, registry to store."""

    def __init__(self, store: Store, registry: RegistryPort, snapshot_seconds: float, wish_seconds: float) -> None:
        self._store = store
        self._registry = registry
        self._snapshot_seconds = snapshot_seconds
        self._wish_seconds = wish_seconds
        self._written: RegistrySnapshot | None = None
        self._lock = asyncio.Lock()
        """Held from reading the registry to writing the store, so that no older snapshot overwrites a newer one."""
        self._down = False

    async def run(self) -> None:
        """Until cancelled: a snapshot when one is due, then the wishes, of which one may wait for ever."""
        due = 0.0
        while True:
            try:
                if self._down or time.monotonic() >= due:  # that no wish waits does not tell that it is back
                    due = time.monotonic() + self._snapshot_seconds
                    await self.refresh()
                await self.carry_out_wishes()
                if self._down:
                    self._down = False
                    log.info("registry_back")
            except Exception as error:  # noqa: BLE001 - whatever MLflow's client raises, the mirror goes on
                if not self._down:
                    self._down = True
                    log.warning("registry_unavailable", error=str(error), kind=type(error).__name__)
            await asyncio.sleep(self._wish_seconds)

    async def refresh(self) -> RegistrySnapshot:
        """Makes the store equal to the registry now. Raises what the registry or the store raise."""
        async with self._lock:
            return await self._refresh()

    async def promote_first(self, version: AdapterVersion) -> bool:
        """Makes `version` the champion unless its adapter has one. True if it is the champion now."""
        key = (version.project, version.base_model, version.adapter)
        async with self._lock:
            aliases = _aliases(await self._refresh(), key)
            if CHAMPION not in aliases:
                await call(self._registry.set_alias, *key, CHAMPION, version.version)
                aliases = _aliases(await self._refresh(), key)
        return aliases.get(CHAMPION) == version.version

    async def carry_out_wishes(self) -> None:
        """Moves every alias that a client asked for. A wish that cannot be met ends with the registry's reason."""
        for wish in await self._store.pending_alias_wishes():
            await self._carry_out(wish)

    async def _carry_out(self, wish: AliasWish) -> None:
        error: JobError | None = None
        async with self._lock:
            try:
                await call(
                    self._registry.set_alias, wish.project, wish.base_model, wish.adapter, wish.alias, wish.version
                )
                await self._refresh()
            except Unavailable:
                raise  # the wish stays
            except GraftError as refusal:
                error = JobError(refusal.code, refusal.reason, refusal.message)
        await to_the_end(self._store.finish_alias_wish(wish.id, error))
        log.info(
            "alias_wish",
            model=f"{wish.base_model}:{wish.adapter}@{wish.version}",
            project=wish.project,
            alias=wish.alias,
            refused=error.reason if error else None,
        )

    async def _refresh(self) -> RegistrySnapshot:
        snapshot = await call(self._registry.snapshot)
        if snapshot != self._written:
            self._written = None  # unknown if the write fails halfway
            await to_the_end(self._store.replace_registry(snapshot))
            self._written = snapshot
        LAST_MIRROR.set_to_current_time()
        return snapshot


def _aliases(snapshot: RegistrySnapshot, key: tuple[str, str, str]) -> dict[str, int]:
    for adapter in snapshot.adapters:
        if (adapter.project, adapter.base_model, adapter.adapter) == key:
            return adapter.aliases
    return {}
