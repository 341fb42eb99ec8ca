"""The registry's read model: follows the registry, carries out wishes, and survives the registry's absence."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from graft.domain.errors import Unavailable
from graft.domain.resources import RegistrySnapshot
from graft.orchestrator.mirror import Mirror
from graft.store.protocol import AliasWish
from tests.support.orchestration import BASE, KEY, PROJECT, World, world


async def _until(condition: Callable[[], Awaitable[bool]]) -> None:
    deadline = time.monotonic() + 10
    while not await condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def _aliases(it: World) -> dict[str, int]:
    page = await it.store.list_adapters(PROJECT, None, 10, "")
    return next((adapter.aliases for adapter in page.items if adapter.adapter == "reviews"), {})


def _wish(version: int) -> AliasWish:
    return AliasWish(f"aw-{version}", PROJECT, BASE, "reviews", "candidate", version)


async def test_an_alias_moved_by_somebody_else_is_mirrored(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        it.registry.add(BASE, "reviews", "job-a")
        it.registry.add(BASE, "reviews", "job-b")
        async with it.orchestrator():
            for version in (1, 2):
                it.registry.aliases[KEY] = {"champion": version}

                async def moved(version: int = version) -> bool:
                    return await _aliases(it) == {"champion": version}

                await _until(moved)


async def test_a_wish_is_carried_out_and_seen_in_the_read_model_when_done(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        it.registry.add(BASE, "reviews", "job-a")
        async with it.orchestrator():
            await it.store.request_alias(_wish(1))

            async def done() -> bool:
                return (await it.store.get_alias_wish("aw-1")).done

            await _until(done)
            assert await _aliases(it) == {"candidate": 1}
        assert (await it.store.get_alias_wish("aw-1")).error is None


async def test_a_wish_for_what_does_not_exist_ends_with_the_registrys_reason(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        it.registry.add(BASE, "reviews", "job-a")
        async with it.orchestrator():
            await it.store.request_alias(_wish(7))

            async def done() -> bool:
                return (await it.store.get_alias_wish("aw-7")).done

            await _until(done)
        error = (await it.store.get_alias_wish("aw-7")).error
        assert error is not None
        assert (error.code, error.reason) == ("NOT_FOUND", "ADAPTER_VERSION_NOT_FOUND")


async def test_a_wish_that_the_registry_never_carries_out_keeps_the_read_model_from_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: object) -> None:
        raise Unavailable("MLflow does not answer as it should (PERMISSION_DENIED).", reason="REGISTRY_UNAVAILABLE")

    async with world(tmp_path) as it:
        it.registry.add(BASE, "reviews", "job-a")
        monkeypatch.setattr(it.registry, "set_alias", read_only)
        await it.store.request_alias(_wish(1))
        async with it.orchestrator():
            it.registry.aliases[KEY] = {"champion": 1}

            async def mirrored() -> bool:
                return await _aliases(it) == {"champion": 1}

            await _until(mirrored)
        assert not (await it.store.get_alias_wish("aw-1")).done


async def test_while_the_registry_is_down_the_read_model_stays_and_wishes_wait(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        it.registry.add(BASE, "reviews", "job-a")
        it.registry.aliases[KEY] = {"champion": 1}
        async with it.orchestrator():

            async def mirrored() -> bool:
                return await _aliases(it) == {"champion": 1}

            await _until(mirrored)
            it.registry.down = True
            await it.store.request_alias(_wish(1))
            await asyncio.sleep(0.2)
            assert not (await it.store.get_alias_wish("aw-1")).done
            assert await _aliases(it) == {"champion": 1}
            it.registry.down = False

            async def done() -> bool:
                return (await it.store.get_alias_wish("aw-1")).done

            await _until(done)
        assert await _aliases(it) == {"champion": 1, "candidate": 1}


async def test_that_the_registry_is_away_and_back_is_told_once_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path) as it:
        asked = 0
        snapshot = it.registry.snapshot

        def counted() -> RegistrySnapshot:
            nonlocal asked
            asked += 1
            return snapshot()

        async def asked_thrice() -> bool:
            return asked >= 3

        async def back() -> bool:
            return logs[-1]["event"] == "registry_back"

        monkeypatch.setattr(it.registry, "snapshot", counted)
        it.registry.down = True
        with capture_logs() as logs:
            following = asyncio.create_task(Mirror(it.store, it.registry, 0.2, 0.01).run())
            await _until(asked_thrice)
            it.registry.down = False
            await _until(back)
            following.cancel()
            await asyncio.wait({following})
        assert [line["event"] for line in logs] == ["registry_unavailable", "registry_back"]


async def test_an_unchanged_registry_is_read_but_not_written(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        writes = 0
        replace_registry = it.store.replace_registry

        async def counted(snapshot: object) -> None:
            nonlocal writes
            writes += 1
            await replace_registry(snapshot)  # type: ignore[arg-type]

        it.store.replace_registry = counted  # type: ignore[method-assign]
        it.registry.add(BASE, "reviews", "job-a")
        async with it.orchestrator():
            before = it.registry.snapshots

            async def read_thrice() -> bool:
                return it.registry.snapshots >= before + 3

            await _until(read_thrice)
        assert writes == 1
