"""The store's base models follow the catalogue while the orchestrator runs."""

import asyncio
import time
from pathlib import Path

import pytest

from graft.domain.errors import InvalidArgument
from graft.orchestrator.catalogue import Catalogue
from graft.registry.catalog import own_file, put
from graft.store.protocol import Store
from tests.support.orchestration import world
from tests.support.tiny_llama import make_tiny_llama


async def _until_listed(store: Store, name: str, *, there: bool) -> None:
    deadline = time.monotonic() + 10
    while (name in {base.id for base in await store.list_base_models()}) is not there:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def test_a_base_model_that_is_added_appears_and_a_broken_file_changes_nothing(tmp_path: Path) -> None:
    folder = await asyncio.to_thread(make_tiny_llama, tmp_path / "tiny")
    async with world(tmp_path) as it:
        settings = it.parts.settings
        catalogue = Catalogue(it.store, settings)
        await catalogue.refresh()
        following = asyncio.create_task(catalogue.run())
        try:
            put(settings, "tiny", {"folder": str(folder)})
            put(settings, "gone", {"folder": str(tmp_path / "gone")})
            await _until_listed(it.store, "tiny", there=True)
            right = own_file(settings).read_text()
            own_file(settings).write_text("tiny: {")
            with pytest.raises(InvalidArgument):
                await Catalogue(it.store, settings).refresh()
            await asyncio.sleep(0.2)  # four turns
            await _until_listed(it.store, "tiny", there=True)
            own_file(settings).write_text(right.replace("tiny:", "other:", 1))
            await _until_listed(it.store, "other", there=True)
            await _until_listed(it.store, "tiny", there=False)
        finally:
            following.cancel()
