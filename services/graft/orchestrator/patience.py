"""Waits for what is away for a moment: an engine, a grader, MLflow.

Knows no job: a job's own waiting, of which its events tell, is `graft.orchestrator.context`.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from graft.domain.errors import ResourceExhausted, Unavailable
from graft.orchestrator.ports import Limits

T = TypeVar("T")

LONGEST_PAUSE = 8
"""In units of the first pause, 16 s: what comes back is asked soon, and an engine with a full queue is left to empty
it."""


async def answered(awaitable: Awaitable[T]) -> T:
    """What the engine answers. Raises Unavailable where its queue is full, since that passes as an outage does."""
    try:
        return await awaitable
    except ResourceExhausted as error:
        if error.reason != "ENGINE_LIMIT":
            raise
        raise Unavailable(error.message, reason="ENGINE_OVERLOADED") from error


async def patiently(what: str, ask: Callable[[], Awaitable[T]], limits: Limits) -> T:
    """Asks until the answer is not Unavailable, with pauses that double.

    `what` begins a sentence, as in "The engine". Raises Unavailable when the limit has passed.
    """
    give_up = time.monotonic() + limits.unavailable_seconds
    pause_seconds = limits.retry_seconds
    while True:
        try:
            return await ask()
        except Unavailable as error:
            left_seconds = give_up - time.monotonic()
            if left_seconds <= 0:
                raise Unavailable(
                    f"{what} has been unavailable for {limits.unavailable_seconds:.0f} s: {error.message}",
                    reason=error.reason,
                ) from error
        await asyncio.sleep(min(pause_seconds, left_seconds))
        pause_seconds = min(2 * pause_seconds, LONGEST_PAUSE * limits.retry_seconds)
