"""Residency: what an engine holds, under sharing, eviction, failure and the engine's death."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from graft.domain.errors import FailedPrecondition, GraftError, Unavailable
from graft.serving.residency import Ref, Residency, engine_name


def ref(name: str) -> Ref:
    return Ref(model=f"base:{name}@1", digest=f"sha256:{name}")


class FakeEngine:
    """Holds at most `capacity` adapters, and fails the test when asked for more or for an id again."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held: dict[int, str] = {}
        self.ids: Counter[int] = Counter()
        self.adds: Counter[str] = Counter()
        self.delay_seconds: Callable[[], float] = lambda: 0.0
        self.error: GraftError | None = None
        self.on_remove: Callable[[str], None] = lambda _name: None

    async def add(self, name: str, int_id: int, path: Path) -> None:
        await asyncio.sleep(self.delay_seconds())
        if self.error is not None:
            raise self.error
        assert path.name == name
        assert int_id not in self.held
        self.held[int_id] = name
        self.ids[int_id] += 1
        self.adds[name] += 1
        assert len(self.held) <= self.capacity
        assert len(set(self.held.values())) == len(self.held)

    async def remove(self, name: str, int_id: int) -> None:
        self.on_remove(name)
        await asyncio.sleep(self.delay_seconds())
        assert self.held.pop(int_id, name) == name


class FakePuller:
    """Pulls in no time, or waits for `gate`; refuses the digests in `broken`."""

    def __init__(self) -> None:
        self.pulls: Counter[str] = Counter()
        self.broken: set[str] = set()
        self.gate: asyncio.Event | None = None

    async def pull(self, ref: Ref) -> Path:
        self.pulls[ref.digest] += 1
        if self.gate is not None:
            await self.gate.wait()
        if ref.digest in self.broken:
            raise FailedPrecondition(f"Adapter {ref.model} is truncated.", reason="ADAPTER_INVALID")
        return Path(engine_name(ref.digest))


def make(capacity: int) -> tuple[Residency, FakeEngine, FakePuller]:
    engine, puller = FakeEngine(capacity), FakePuller()
    return Residency(capacity, engine, puller), engine, puller


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_an_adapter_that_is_unloaded_while_it_fails_to_come_back_leaves_its_slot_once() -> None:
    residency, engine, _ = make(1)
    await residency.load(ref("a"))
    engine.held.clear()
    residency.engine_died()
    engine.error = FailedPrecondition("The engine refused the adapter.", reason="ADAPTER_INVALID")
    delays = iter([0.05, 0.0])  # to come back, to leave
    engine.delay_seconds = lambda: next(delays)
    restoring = asyncio.create_task(residency.restore())
    await settle()
    await residency.unload("sha256:a")
    await restoring
    engine.error, engine.delay_seconds = None, lambda: 0.0
    await residency.load(ref("b"))
    assert [held.digest for held in residency.held()] == ["sha256:b"]


async def test_concurrent_requests_for_one_digest_share_one_load() -> None:
    residency, engine, puller = make(2)
    puller.gate = asyncio.Event()
    loads = [asyncio.create_task(residency.load(ref("a"))) for _ in range(5)]
    await settle()
    puller.gate.set()
    await asyncio.gather(*loads)
    assert puller.pulls["sha256:a"] == engine.adds[engine_name("sha256:a")] == 1


async def test_the_least_recently_used_idle_adapter_leaves_for_a_newcomer() -> None:
    residency, engine, _ = make(2)
    for name in ("a", "b", "a", "c"):
        await residency.load(ref(name))
    assert [held.digest for held in residency.held()] == ["sha256:c", "sha256:a"]
    assert set(engine.held.values()) == {engine_name("sha256:a"), engine_name("sha256:c")}


async def test_an_adapter_that_comes_back_gets_a_new_integer_id() -> None:
    residency, engine, _ = make(1)
    for name in ("a", "b", "a"):
        await residency.load(ref(name))
    assert sorted(engine.ids) == [1, 2, 3]
    assert max(engine.ids.values()) == 1


async def test_an_adapter_with_requests_in_flight_is_not_evicted_before_they_end() -> None:
    residency, engine, _ = make(1)
    async with residency.use(ref("a")):
        newcomer = asyncio.create_task(residency.load(ref("b")))
        await settle()
        assert not newcomer.done()
        assert list(engine.held.values()) == [engine_name("sha256:a")]
    await newcomer
    assert list(engine.held.values()) == [engine_name("sha256:b")]


async def test_an_idle_adapter_leaves_before_a_busy_one_that_was_used_longer_ago() -> None:
    residency, _, _ = make(2)
    async with residency.use(ref("busy")):
        await residency.load(ref("idle"))
        await residency.load(ref("new"))
        assert {held.digest for held in residency.held()} == {"sha256:busy", "sha256:new"}


async def test_a_newcomer_gets_in_although_the_resident_adapter_is_asked_for_without_pause() -> None:
    residency, _, _ = make(1)
    stop = asyncio.Event()

    async def keep_using() -> None:
        while not stop.is_set():
            async with residency.use(ref("a")):
                await asyncio.sleep(0.001)

    users = [asyncio.create_task(keep_using()) for _ in range(3)]
    await asyncio.sleep(0.01)
    await asyncio.wait_for(residency.load(ref("b")), timeout=20)
    stop.set()
    await asyncio.gather(*users)


async def test_unload_waits_for_requests_in_flight_and_a_later_request_loads_again() -> None:
    residency, engine, _ = make(2)
    async with residency.use(ref("a")):
        unload = asyncio.create_task(residency.unload("sha256:a"))
        await settle()
        late = asyncio.create_task(residency.load(ref("a")))
        await settle()
        assert not unload.done()
        assert not late.done()
    await unload
    await late
    assert engine.adds[engine_name("sha256:a")] == 2


async def test_a_cancelled_unload_still_takes_the_adapter_out() -> None:
    residency, engine, _ = make(2)
    async with residency.use(ref("a")):
        unload = asyncio.create_task(residency.unload("sha256:a"))
        await settle()
        unload.cancel()
    await settle()
    assert engine.held == {}
    assert residency.held() == []


async def test_unloading_what_is_not_there_does_nothing() -> None:
    residency, _, _ = make(1)
    await residency.unload("sha256:nothing")


async def test_unloading_during_a_failing_load_does_nothing() -> None:
    residency, _, puller = make(1)
    puller.gate = asyncio.Event()
    puller.broken.add("sha256:a")
    load = asyncio.create_task(residency.load(ref("a")))
    await settle()
    unload = asyncio.create_task(residency.unload("sha256:a"))
    await settle()
    puller.gate.set()
    await unload
    with pytest.raises(FailedPrecondition):
        await load


async def test_a_failed_pull_fails_its_own_requests_and_frees_everything() -> None:
    residency, engine, puller = make(1)
    puller.broken.add("sha256:bad")
    for _ in range(3):
        with pytest.raises(FailedPrecondition, match="truncated"):
            await residency.load(ref("bad"))
    await residency.load(ref("good"))
    assert [held.digest for held in residency.held()] == ["sha256:good"]
    assert len(engine.held) == 1


async def test_an_engine_that_refuses_an_adapter_gives_its_slot_back() -> None:
    residency, engine, _ = make(1)
    engine.error = FailedPrecondition("No.", reason="ADAPTER_INVALID")
    with pytest.raises(FailedPrecondition):
        await residency.load(ref("a"))
    engine.error = None
    await asyncio.wait_for(residency.load(ref("b")), timeout=20)


async def test_a_client_that_goes_away_does_not_cancel_the_load_of_another() -> None:
    residency, _, puller = make(1)
    puller.gate = asyncio.Event()
    gone, stays = (asyncio.create_task(residency.load(ref("a"))) for _ in range(2))
    await settle()
    gone.cancel()
    await settle()
    puller.gate.set()
    await stays
    assert [held.active_requests for held in residency.held()] == [0]


async def test_adapters_come_back_after_the_engine_died() -> None:
    residency, engine, _ = make(3)
    for name in ("a", "b"):
        await residency.load(ref(name))
    residency.engine_died()
    engine.held.clear()
    assert not any(held.in_engine for held in residency.held())
    await residency.restore()
    assert set(engine.held.values()) == {engine_name("sha256:a"), engine_name("sha256:b")}
    assert all(held.in_engine for held in residency.held())


async def test_an_adapter_that_cannot_come_back_is_dropped_and_loaded_on_demand() -> None:
    residency, engine, _ = make(1)
    await residency.load(ref("a"))
    residency.engine_died()
    engine.held.clear()
    engine.error = FailedPrecondition("Gone.", reason="ADAPTER_INVALID")
    await residency.restore()
    assert residency.held() == []
    engine.error = None
    await residency.load(ref("a"))


async def test_nothing_is_dropped_when_the_replacement_dies_too() -> None:
    residency, engine, _ = make(1)
    await residency.load(ref("a"))
    residency.engine_died()
    engine.held.clear()
    engine.error = Unavailable("Dead.", reason="ENGINE_RESTARTING")
    with pytest.raises(Unavailable):
        await residency.restore()
    engine.error = None
    await residency.restore()
    assert [held.in_engine for held in residency.held()] == [True]


async def test_a_load_that_ended_in_an_engine_that_then_died_is_not_taken_for_resident() -> None:
    residency, engine, _ = make(1)
    engine.delay_seconds = lambda: 0.01
    load = asyncio.create_task(residency.load(ref("a")))
    await asyncio.sleep(0.001)
    residency.engine_died()
    with pytest.raises(Unavailable):
        await load
    assert residency.held() == []


@pytest.mark.parametrize("seed", range(8))
async def test_random_churn_never_overfills_never_removes_under_a_request_and_ends_clean(seed: int) -> None:
    dice = random.Random(seed)
    capacity = dice.randint(1, 4)
    residency, engine, puller = make(capacity)
    engine.delay_seconds = lambda: dice.random() * 0.002
    puller.broken = {"sha256:x0"}
    in_flight: Counter[str] = Counter()
    answered = 0

    def check(name: str) -> None:
        assert in_flight[name] == 0, "removed under a request"

    engine.on_remove = check

    async def request() -> None:
        nonlocal answered
        wanted = ref(dice.choice(["x0", *(f"a{number}" for number in range(8))]))
        try:
            async with residency.use(wanted) as name:
                in_flight[name] += 1
                try:
                    assert name in engine.held.values()
                    await asyncio.sleep(dice.random() * 0.003)
                    answered += 1
                finally:
                    in_flight[name] -= 1
        except FailedPrecondition:
            assert wanted.digest == "sha256:x0"

    async def work() -> None:
        for _ in range(20):
            action = asyncio.create_task(
                request() if dice.random() < 0.9 else residency.unload(f"sha256:a{dice.randrange(8)}")
            )
            if dice.random() < 0.1:
                await asyncio.sleep(dice.random() * 0.002)
                action.cancel()
            await asyncio.wait([action])
            if not action.cancelled():
                action.result()

    await asyncio.wait_for(asyncio.gather(*(work() for _ in range(12))), timeout=30)
    assert answered > 100
    for digest in [held.digest for held in residency.held()]:
        await residency.unload(digest)
    assert engine.held == {}
    assert residency.held() == []
    assert max(engine.ids.values()) == 1
