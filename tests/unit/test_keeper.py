"""The keeper: an engine that dies is replaced, and its adapters come back."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from graft.domain.errors import Unavailable
from graft.serving import keeper as keeper_module
from graft.serving.keeper import Keeper
from graft.serving.residency import Ref, Residency, engine_name

A = Ref(model="base:a@1", digest="sha256:a")


class FakeEngine:
    def __init__(self) -> None:
        self.dead = False
        self.closed = False
        self.held: dict[int, str] = {}

    async def add(self, name: str, int_id: int, _path: Path) -> None:
        if self.dead:
            raise Unavailable("Dead.", reason="ENGINE_RESTARTING")
        self.held[int_id] = name

    async def remove(self, _name: str, int_id: int) -> None:
        self.held.pop(int_id, None)

    def close(self) -> None:
        self.closed = True


class Puller:
    async def pull(self, ref: Ref) -> Path:
        return Path(ref.digest)


class Stand:
    """A keeper whose engines are made by `make`, and are kept in `engines`."""

    def __init__(self) -> None:
        self.engines: list[FakeEngine] = []
        self.make: Callable[[], FakeEngine] = FakeEngine
        self.keeper: Keeper[FakeEngine] = Keeper(self._build)
        self.residency = Residency(2, self.keeper, Puller())
        self.task = asyncio.create_task(self.keeper.run(self.residency))

    async def _build(self) -> FakeEngine:
        await asyncio.sleep(0)
        self.engines.append(self.make())
        return self.engines[-1]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110  # a condition over several parts
                await asyncio.sleep(0.001)


@pytest.fixture
async def stand(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stand]:
    monkeypatch.setattr(keeper_module, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(keeper_module, "MAX_BACKOFF_SECONDS", 0.01)
    stand = Stand()
    yield stand
    stand.task.cancel()
    await stand.keeper.close()


async def never() -> FakeEngine:
    raise AssertionError("nobody runs this keeper")


async def test_a_request_before_the_engine_is_there_is_unavailable_with_a_retry_hint() -> None:
    with pytest.raises(Unavailable) as caught:
        Keeper(never).engine()
    assert (caught.value.reason, caught.value.retry_after_seconds) == ("ENGINE_STARTING", 2.0)


async def test_a_dead_engine_is_replaced_and_its_adapters_come_back(stand: Stand) -> None:
    await stand.until(lambda: stand.keeper.ready)
    await stand.residency.load(A)
    stand.engines[0].dead = True
    with pytest.raises(Unavailable) as caught:
        stand.keeper.engine()
    assert caught.value.reason == "ENGINE_RESTARTING"
    await stand.until(lambda: stand.keeper.ready)
    assert stand.engines[0].closed
    assert list(stand.engines[1].held.values()) == [engine_name("sha256:a")]
    assert stand.keeper.restarts == 1
    assert [held.in_engine for held in stand.residency.held()] == [True]


async def test_a_replacement_that_dies_at_once_is_replaced_too_without_losing_adapters(stand: Stand) -> None:
    await stand.until(lambda: stand.keeper.ready)
    await stand.residency.load(A)

    def born_dead() -> FakeEngine:
        engine = FakeEngine()
        engine.dead = len(stand.engines) == 1
        return engine

    stand.make = born_dead
    stand.engines[0].dead = True
    await stand.until(lambda: len(stand.engines) >= 3 and stand.keeper.ready)
    assert list(stand.engines[-1].held.values()) == [engine_name("sha256:a")]


async def test_an_engine_that_does_not_start_says_why_and_is_tried_again(stand: Stand) -> None:
    await stand.until(lambda: stand.keeper.ready)
    attempts = 0

    def fail() -> FakeEngine:
        nonlocal attempts
        attempts += 1
        raise ValueError("Free memory is too small.\nTrace …")

    stand.make = fail
    stand.engines[0].dead = True
    await stand.until(lambda: attempts >= 2)
    with pytest.raises(Unavailable, match=r"does not start: Free memory is too small\.$"):
        stand.keeper.engine()
    stand.make = FakeEngine
    await stand.until(lambda: stand.keeper.ready)


async def test_who_waits_for_the_first_engine_goes_on_when_it_answers(stand: Stand) -> None:
    await stand.keeper.started()
    assert stand.keeper.ready


async def test_who_waits_for_the_first_engine_is_told_why_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_module, "MAX_BACKOFF_SECONDS", 0.01)

    async def fail() -> FakeEngine:
        raise ValueError("Free memory is too small.")

    keeper = Keeper(fail)
    task = asyncio.create_task(keeper.run(Residency(2, keeper, Puller())))
    with pytest.raises(Unavailable, match=r"does not start: Free memory is too small\.$"):
        await keeper.started()
    task.cancel()


async def test_loading_while_there_is_no_engine_is_unavailable() -> None:
    with pytest.raises(Unavailable):
        await Keeper(never).add("graft-a", 1, Path("a"))


async def test_removing_while_there_is_no_engine_does_nothing() -> None:
    await Keeper(never).remove("graft-a", 1)
