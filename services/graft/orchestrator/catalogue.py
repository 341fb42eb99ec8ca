"""The store's list of base models kept equal to the catalogue, so that a new one needs no restart.

One way, files to store. What is at fault in the catalogue is told once in the log; the rest of it counts. Full models
that are served stay, where the orchestrator that has them in its home leads no more: their engines answer.
"""

import asyncio

import structlog

from graft.domain.deployments import full_model_source
from graft.domain.resources import BaseModel
from graft.orchestrator.threads import call, to_the_end
from graft.registry.base_models import catalog_stamp, load_catalog
from graft.settings import Settings
from graft.store.protocol import Store

log = structlog.get_logger()


class Catalogue:
    """Copies the ready base models into the store."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._settings = settings
        self._read: tuple[int, ...] = ()
        """The stamp of what was last copied."""
        # A deployment refreshes too; of two at once the slower would copy what it read first.
        self._refreshing = asyncio.Lock()
        self._told: dict[str, str] = {}
        """Faults that the log has."""

    async def run(self) -> None:
        """Until cancelled: looks as often as at the registry, and copies when something has changed."""
        while True:
            await asyncio.sleep(self._settings.orchestrator.registry_poll_seconds)
            try:
                await self.refresh()
            except Exception as error:  # noqa: BLE001 - a catalogue that somebody edits may be wrong for a moment
                self._tell({"": str(error)})

    async def refresh(self) -> None:
        """Copies, if something has changed. Raises InvalidArgument when the catalogue cannot be read."""
        async with self._refreshing:
            stamp = await call(catalog_stamp, self._settings)
            if stamp == self._read:
                return
            faults: dict[str, str] = {}
            models = await call(load_catalog, self._settings, lambda base, error: faults.update({base: error.message}))
            models += await self._served(models)
            await to_the_end(self._store.replace_base_models(models))
            self._read = stamp
            self._tell(faults)
            log.info("base_models", ready=[model.id for model in models])

    async def _served(self, models: list[BaseModel]) -> list[BaseModel]:
        """Full models that are deployed and not among `models`: this home has them again in a moment."""
        known = {model.id for model in models}
        every = await self._store.every_deployment()
        sources = {full_model_source(one.project, one.source) for one in every if one.is_version}
        there = await self._store.list_base_models() if sources else ()
        return [model for model in there if model.id not in known and model.source in sources]

    def _tell(self, faults: dict[str, str]) -> None:
        for base, message in faults.items():
            if self._told.get(base) != message:
                log.warning("base_model_unusable", base_model=base, error=message)
        self._told = faults
