"""The store's base models follow the catalogue while the orchestrator runs."""

import asyncio
import time
from pathlib import Path

import pytest

from graft.domain.errors import InvalidArgument
from graft.domain.resources import BaseModel
from graft.orchestrator.catalogue import Catalogue
from graft.registry.base_models import OnFault, load_catalog
from graft.registry.catalog import own_file, put
from graft.settings import Settings
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
            await asyncio.wait({following})


async def test_a_folder_that_comes_later_is_noticed(tmp_path: Path) -> None:
    made = await asyncio.to_thread(make_tiny_llama, tmp_path / "made")
    async with world(tmp_path) as it:
        settings = it.parts.settings
        catalogue = Catalogue(it.store, settings)
        put(settings, "late", {"folder": str(tmp_path / "late")})
        await catalogue.refresh()
        assert "late" not in {base.id for base in await it.store.list_base_models()}
        made.rename(tmp_path / "late")
        await catalogue.refresh()
        assert "late" in {base.id for base in await it.store.list_base_models()}


async def test_two_who_refresh_at_once_copy_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []

    def counted(settings: Settings, on_fault: OnFault) -> list[BaseModel]:
        loads.append(settings)
        return load_catalog(settings, on_fault)

    monkeypatch.setattr("graft.orchestrator.catalogue.load_catalog", counted)
    async with world(tmp_path) as it:
        catalogue = Catalogue(it.store, it.parts.settings)
        await asyncio.gather(catalogue.refresh(), catalogue.refresh(), catalogue.refresh())
    assert len(loads) == 1
