"""Sampling through the internal `Engine` service, and patience with it."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from graft.domain.errors import FailedPrecondition, Unavailable
from graft.domain.jobs import Reinforcement
from graft.internal.engine_client import EngineClient
from graft.training.rollouts import EngineSampler, Patience, Policy
from tests.support.fake_engine import FakeEngine, fake_engine

ASKED = Reinforcement(None, 3, 7, 0.8, 0.0, 0.2)
POLICY = Policy("tiny:ft-1-step-4", "sha256:abc", "/somewhere/step-4")


def sampler_of(engine: FakeEngine, told: list[str], limit_seconds: float = 60.0) -> EngineSampler:
    patience = Patience(lambda _, data: told.append(data["message"]), limit_seconds)
    return EngineSampler(EngineClient(engine.address, "tiny").of("tiny"), "tiny", ASKED, patience)


async def test_each_prompt_is_sampled_as_often_as_its_group_is_large_from_the_policy_itself() -> None:
    async with fake_engine("tiny") as engine:
        sampler = sampler_of(engine, [])
        found = await asyncio.to_thread(sampler.sample, [[5, 6], [7]], [11, 12], POLICY)
        await asyncio.to_thread(sampler.sample, [[5]], [13], None)
        await asyncio.to_thread(sampler.close)
    assert [[answer.token_ids for answer in answers] for answers in found] == [[(0,), (1,), (2,)]] * 2
    assert [(answer.log_probs_T, answer.text, answer.cut) for answer in found[0]] == [
        ((-0.0,), "answer 0", False),
        ((-1.0,), "answer 1", False),
        ((-2.0,), "answer 2", True),
    ]
    sent = {tuple(body["prompt"]): (request, body) for request, body in engine.requests[:2]}
    request, body = sent[(5, 6)]
    assert (request.adapter.model, request.adapter.digest, request.adapter.path) == (
        POLICY.model,
        POLICY.digest,
        POLICY.path,
    )
    assert (body["n"], body["max_tokens"], body["temperature"], body["seed"]) == (3, 7, 0.8, 11)
    assert (body["top_p"], body["top_k"], body["min_p"], body["repetition_penalty"]) == (1.0, 0, 0.0, 1.0)
    assert sent[(7,)][1]["seed"] == 12
    assert not engine.requests[2][0].HasField("adapter"), "the base itself, before anything is learned"


async def test_a_policy_is_loaded_and_taken_out() -> None:
    async with fake_engine("tiny") as engine:
        sampler = sampler_of(engine, [])
        await asyncio.to_thread(sampler.load, POLICY)
        assert [held.model for held in engine.replica.adapters] == [POLICY.model]
        await asyncio.to_thread(sampler.unload, POLICY)
        assert not engine.replica.adapters
        await asyncio.to_thread(sampler.close)


async def test_an_engine_that_restarts_is_waited_for_and_told_of_once() -> None:
    async with fake_engine("tiny") as engine:
        told: list[str] = []
        sampler = sampler_of(engine, told)
        engine.error = Unavailable("It restarts.", reason="ENGINE_RESTARTING", retry_after_seconds=0.01)
        sampling = asyncio.create_task(asyncio.to_thread(sampler.sample, [[5], [6]], [1, 2], None))
        for _ in range(2000):
            if len(engine.requests) >= 6:
                break
            await asyncio.sleep(0.01)
        engine.error = None
        assert len(await sampling) == 2
        await asyncio.to_thread(sampler.close)
    assert told == [
        "The engine is not available: It restarts. Trying again for up to 60 s.",
        "The engine is available.",
    ]


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (400, FailedPrecondition, r"The engine refused to sample: top_p must be in"),
        (503, Unavailable, r"The engine has been unavailable for 0 s: It is overloaded\."),
    ],
)
async def test_what_the_engine_refuses_fails_and_what_it_puts_off_is_asked_again(
    status: int, kind: type[Exception], words: str
) -> None:
    async with fake_engine("tiny") as engine:
        sampler = sampler_of(engine, [], limit_seconds=0.0)
        engine.refuse = status
        with pytest.raises(kind, match=words):
            await asyncio.to_thread(sampler.sample, [[5]], [1], None)
        await asyncio.to_thread(sampler.close)


async def test_patience_tells_once_that_it_waits_and_once_that_it_is_over() -> None:
    told: list[str] = []
    patience = Patience(lambda _, data: told.append(data["message"]))
    await patience.ask("The grader", failing(2))
    assert told == [
        "The grader is not available: It is starting. Trying again for up to 600 s.",
        "The grader is available.",
    ]


def failing(times: int) -> Callable[[], Any]:
    left = [times]

    async def ask() -> None:
        if left[0]:
            left[0] -= 1
            raise Unavailable("It is starting.", reason="STARTING", retry_after_seconds=0.001)

    return ask
