"""Questions to several models at once, through a real gateway."""

from pathlib import Path

import pytest

from graft.cli.asking import Asked, ask
from graft.client import AsyncGraft, Connection
from graft.domain.errors import NotFound
from tests.support import gateways


def _prompts(count: int, what: str) -> tuple[list[dict[str, str]], ...]:
    return tuple([{"role": "user", "content": f"{what} {number}"}] for number in range(count))


async def test_answers_come_in_the_order_of_their_prompts_and_requests_do_not(tmp_path: Path) -> None:
    counted = []
    async with gateways.gateway(tmp_path) as running, AsyncGraft(Connection(address=running.address)) as graft:
        contestants = [
            Asked(gateways.BASE, _prompts(20, "base")),
            Asked(f"{gateways.BASE}:reviews@1", _prompts(20, "adapter"), choices=("yes", "no"), max_tokens=3),
        ]
        base, adapter = await ask(graft, contestants, concurrency=4, on_answer=lambda: counted.append(1))
        assert base == [f"[base] base {number}" for number in range(20)]
        assert adapter == [f"[{gateways.BASE}:reviews@1] adapter {number}" for number in range(20)]
        assert len(counted) == 40
        speakers = [request.HasField("adapter") for request, _body in running.engine.requests]
        assert True in speakers[:20], "base and adapter take turns in batches"
        assert False in speakers[:20]
        for request, body in running.engine.requests:
            assert body["temperature"] == 0
            assert (body["max_tokens"] == 3) == request.HasField("adapter")


async def test_no_more_than_the_given_number_of_requests_are_in_flight(tmp_path: Path) -> None:
    async with gateways.gateway(tmp_path) as running, AsyncGraft(Connection(address=running.address)) as graft:
        running.engine.delay_seconds = 0.02
        answered = 0
        most = 0

        def count() -> None:
            nonlocal answered, most
            most = max(most, len(running.engine.requests) - answered)
            answered += 1

        await ask(graft, [Asked(gateways.BASE, _prompts(30, "q"))], 3, count)
        assert answered == 30
        assert most <= 3


async def test_the_first_failure_ends_the_asking(tmp_path: Path) -> None:
    async with gateways.gateway(tmp_path) as running, AsyncGraft(Connection(address=running.address)) as graft:
        contestants = [Asked(f"{gateways.BASE}:nobody", _prompts(100, "q")), Asked(gateways.BASE, _prompts(100, "q"))]
        with pytest.raises(NotFound, match="nobody"):
            await ask(graft, contestants, concurrency=2)
        assert len(running.engine.requests) < 100
