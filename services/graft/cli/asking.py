"""Puts the same questions to several models through the public API, many at once, and keeps the answers in order.

Owns the mixing: requests of all contestants of all tasks are shuffled into one stream, so that the engine's batches
hold base and adapters together. Does not know what a good answer is.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from graft.client import AsyncGraft
from graft.data.samples import Message


@dataclass(frozen=True)
class Asked:
    """One contestant of a task: a model, a way of prompting it, and the prompts of every row."""

    model: str
    prompts: tuple[list[Message], ...]
    choices: tuple[str, ...] = ()
    """The answer is one of these; free text when empty."""
    max_tokens: int = 32
    stop: tuple[str, ...] = ()


async def ask(
    graft: AsyncGraft,
    contestants: Sequence[Asked],
    concurrency: int,
    on_answer: Callable[[], None] = lambda: None,
    seed: int = 0,
) -> list[list[str]]:
    """Every contestant's answers, in the order of its prompts. Greedy; at most `concurrency` requests in flight.

    Raises the first failure; requests that have not been sent by then are not sent.
    """
    waiting = [(who, row) for who, asked in enumerate(contestants) for row in range(len(asked.prompts))]
    random.Random(seed).shuffle(waiting)
    answers = [[""] * len(asked.prompts) for asked in contestants]

    async def work() -> None:
        while waiting:
            who, row = waiting.pop()
            asked = contestants[who]
            answer = await graft.generate(
                asked.model,
                messages=asked.prompts[row],
                choices=asked.choices,
                max_tokens=asked.max_tokens,
                stop=asked.stop,
            )
            answers[who][row] = answer.text
            on_answer()

    workers = [asyncio.create_task(work()) for _ in range(concurrency)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            if not worker.cancelling():  # as gather has been: a second time would cut short how it ends
                worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    return answers
