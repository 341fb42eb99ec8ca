"""Streamed chats sent by a closed loop of clients, and what each took: the same for every server that is compared.

Knows nothing of servers: an `Ask` sends one question and yields text as it comes.
"""

import asyncio
import itertools
import json
import statistics
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp

Ask = Callable[[str], AsyncIterator[str]]
"""Question in, pieces of the answer's text out."""


@dataclass(frozen=True)
class Load:
    """What a number of requests took."""

    seconds: float
    answers: dict[str, str]
    """By question."""
    first_token_seconds: list[float]

    @property
    def requests_per_second(self) -> float:
        """Of all requests."""
        return len(self.answers) / self.seconds

    @property
    def median_first_token_seconds(self) -> float:
        """From sending to the first piece with text."""
        return statistics.median(self.first_token_seconds)


async def drive(ask: Ask, questions: list[str], in_flight: int) -> Load:
    """Asks all questions, `in_flight` at a time: each client sends its next one when it has its answer."""
    answers: dict[str, str] = {}
    first_token_seconds: list[float] = []
    waiting = iter(questions)

    async def client() -> None:
        for question in waiting:
            sent = time.perf_counter()
            pieces: list[str] = []
            async for piece in ask(question):
                if not pieces:
                    first_token_seconds.append(time.perf_counter() - sent)
                pieces.append(piece)
            answers[question] = "".join(pieces)

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(in_flight)))
    return Load(time.perf_counter() - started, answers, first_token_seconds)


def questions(count: int, seed: str) -> list[str]:
    """Questions of one length that no cache has seen: what makes each its own comes first."""
    return [f"{seed} {number:05d}: what does a gardener do with a scion in spring?" for number in range(count)]


def body(model: str, question: str, max_tokens: int) -> dict[str, Any]:
    """OpenAI's body of a streamed, greedy chat."""
    messages = [{"role": "user", "content": question}]
    return {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0, "stream": True}


def http_ask(session: aiohttp.ClientSession, base_url: str, model: str, max_tokens: int) -> Ask:
    """Asks an OpenAI-compatible server. Raises ClientResponseError for any status but 200."""

    async def ask(question: str) -> AsyncIterator[str]:
        async with session.post(f"{base_url}/chat/completions", json=body(model, question, max_tokens)) as response:
            response.raise_for_status()
            async for line in response.content:
                if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                    for text in texts(json.loads(line.removeprefix(b"data: "))):
                        yield text

    return ask


def texts(chunk: dict[str, Any]) -> list[str]:
    """The pieces of text in one chunk of a streamed chat; the first chunk has none."""
    return [text for choice in chunk.get("choices", ()) if (text := choice["delta"].get("content"))]


_SEEDS = itertools.count()


def fresh_seed() -> str:
    """Never the same twice in a process, always of one length."""
    return f"{next(_SEEDS):04d}"
