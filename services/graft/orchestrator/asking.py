"""Puts an evaluation's questions to one contestant through the engine, many at once, and keeps every answer on disk.

Owns the requests and the file of answers, from which a restarted orchestrator goes on. Does not know what a good
answer is (`graft.evaluation`), nor whose turn it is (`graft.orchestrator.evaluations`).
"""

import asyncio
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from graft.data.canonical import Preference
from graft.data.preference import render_preference
from graft.data.questions import Ask, Grade, Predict, Prompt, Question, Questions, Rank, with_shots
from graft.data.rendering import Example, Tokenizer, prompt_ids
from graft.domain.errors import FailedPrecondition, InvalidArgument, Unavailable
from graft.domain.resources import BaseModel
from graft.domain.stored import from_json
from graft.internal.v1 import engine_pb2
from graft.orchestrator.patience import answered, patiently
from graft.orchestrator.ports import Engine, Limits
from graft.orchestrator.threads import call

TIMEOUT_SECONDS = 600.0
"""A queue of long answers on a CPU takes minutes; a client's own default is the same."""
CONCURRENCY = 16
"""Requests in flight. vLLM batches them; more would only wait in its queue."""


@dataclass(frozen=True)
class Answer:
    """What came of one question. Of `texts` and `nats` one is empty, as the question asks."""

    row: int
    texts: tuple[str, ...] = ()
    nats: tuple[float, ...] = ()
    """Negative log-probabilities, summed over the tokens of each given text."""
    scored_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0
    """From request to whole answer."""
    unanswered: str = ""
    """Why there is none, where the question does not fit into the context. `texts` are empty then, and `nats` alike."""


@dataclass(frozen=True)
class Asked:
    """One contestant: who answers, what it is shown before each question, and how its answers are made."""

    adapter: engine_pb2.AdapterRef | None
    public_model: str
    base: BaseModel
    context_tokens: int
    """The engine's."""
    tokenizer: Callable[[], Tokenizer]
    """Loads the base's own, in a thread: needed where given texts are scored, and for a prompt that is refused."""
    shots: tuple[Ask, ...]
    samples: int
    max_tokens: int
    limits: Limits
    """How long the engine may be away, or its queue full."""
    seed: int = 0


class Answers:
    """The answers of one contestant: one JSON object a line, each written when it comes. Used by one task.

    What a killed process left half written is cut off, so that the next answer begins a line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.found: dict[int, Answer] = {}
        if not path.is_file():
            return
        *lines, rest = path.read_bytes().split(b"\n")
        if rest:
            os.truncate(path, path.stat().st_size - len(rest))
        for line in lines:
            try:
                answer = from_json(Answer, json.loads(line))
            except (ValueError, TypeError, AttributeError):  # no answer: asked again
                continue
            self.found[answer.row] = answer

    def keep(self, answer: Answer) -> None:
        """Writes an answer."""
        self.found[answer.row] = answer
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "a") as file:
            file.write(json.dumps(asdict(answer)) + "\n")


async def ask_all(
    engine: Engine, asked: Asked, questions: Questions, answers: Answers, on_answer: Callable[[], None]
) -> float:
    """Asks what `answers` does not hold yet; returns the seconds that it took. Raises the first failure."""
    waiting = [row for row in reversed(range(len(questions.items))) if row not in answers.found]
    started = time.monotonic()

    async def work() -> None:
        while waiting:
            row = waiting.pop()
            answers.keep(await _answer(engine, asked, questions, row))
            on_answer()

    workers = [asyncio.create_task(work()) for _ in range(min(CONCURRENCY, len(waiting)))]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            if not worker.cancelling():  # as gather has been: a second time would cut short how it ends
                worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    return time.monotonic() - started


async def _answer(engine: Engine, asked: Asked, questions: Questions, row: int) -> Answer:
    item: Question = questions.items[row]
    return await (
        _generated(engine, asked, questions, row, item)
        if isinstance(item, Ask | Grade)
        else _scored(engine, asked, row, item)
    )


async def _generated(engine: Engine, asked: Asked, questions: Questions, row: int, item: Ask | Grade) -> Answer:
    started = time.monotonic()
    prompt = with_shots(item.prompt, asked.shots)
    body = _body(asked, questions, item, prompt, row)
    completions = isinstance(prompt, str)
    try:
        told = await _generate(engine, asked, body, completions)
    except FailedPrecondition as refusal:
        # Tokens are counted of those alone that are refused: it needs the tokenizer, and seldom matters.
        try:
            prompt_tokens = await call(_count, asked, item, prompt)
        except (InvalidArgument, OSError, ValueError):
            raise refusal from None
        left_tokens = asked.context_tokens - prompt_tokens
        if left_tokens >= body["max_tokens"]:
            raise
        if left_tokens < 1:
            texts = ("",) * int(body.get("n", 1))
            reason = f"The prompt has {prompt_tokens} tokens, and the context {asked.context_tokens}."
            return Answer(row, texts, seconds=time.monotonic() - started, unanswered=reason)
        told = await _generate(engine, asked, {**body, "max_tokens": left_tokens}, completions)
    texts = tuple(_text(choice) for choice in told["choices"])
    tokens = int((told.get("usage") or {}).get("completion_tokens") or 0)
    return Answer(row, texts, generated_tokens=tokens, seconds=time.monotonic() - started)


def _count(asked: Asked, item: Ask | Grade, prompt: Prompt) -> int:
    """Tokens of a prompt, as the engine makes them."""
    return len(prompt_ids(prompt, asked.tokenizer(), item.tools if isinstance(item, Ask) else ()))


async def _scored(engine: Engine, asked: Asked, row: int, item: Rank | Predict) -> Answer:
    started = time.monotonic()
    tokenizer = await call(asked.tokenizer)
    if isinstance(item, Predict):
        texts = [await call(_windows, tokenizer, asked.context_tokens, item)]
    else:
        try:
            texts = [[example] for example in await call(_pair, tokenizer, asked.context_tokens, item)]
        except _TooLongError as error:
            return Answer(row, (), (0.0, 0.0), seconds=time.monotonic() - started, unanswered=str(error))
    nats: list[float] = []
    for windows in texts:
        nats.append(sum([await _score(engine, asked, window) for window in windows]))
    tokens = sum(sum(window.loss_mask) for window in texts[0])
    return Answer(row, (), tuple(nats), tokens, 0, time.monotonic() - started)


def _body(asked: Asked, questions: Questions, item: Ask | Grade, prompt: Prompt, row: int) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": asked.public_model,
        "max_tokens": asked.max_tokens or questions.max_tokens,
        "temperature": questions.temperature,
    }
    if asked.samples > 1:
        # Samples of temperature 0 would all be one; 0.8 is Chen et al.'s for large k (arXiv:2107.03374, section 2.1).
        body |= {"n": asked.samples, "temperature": questions.temperature or 0.8, "seed": asked.seed + row}
    if questions.stop:
        body["stop"] = list(questions.stop)
    if isinstance(item, Ask) and item.choices:
        body["structured_outputs"] = {"choice": list(item.choices)}
    if isinstance(prompt, str):
        return {**body, "prompt": prompt}
    if isinstance(item, Ask) and item.tools:
        body |= {"tools": list(item.tools), "tool_choice": "none"}
    return {**body, "messages": [dict(message) for message in prompt]}


def _text(choice: Mapping[str, Any]) -> str:
    text = choice["message"].get("content") if "message" in choice else choice.get("text")
    return str(text or "").strip()


def _windows(tokenizer: Tokenizer, context_tokens: int, item: Predict) -> list[Example]:
    """A text's token ids in pieces that fit the context, each with what comes before it: every token is scored once.

    The first token is predicted from the tokenizer's own beginning of a text or, where it has none, from the end of
    another, as `lm-eval` does (EleutherAI, rolling log-likelihood with one token of context).
    """
    plain = tokenizer.encode(item.text, add_special_tokens=False)
    whole = tokenizer.encode(item.text, add_special_tokens=True)
    # Some tokenizers put an end behind the text as well, which is no part of it.
    extra = len(whole) - len(plain)
    begins = next((at for at in range(extra) if whole[at : at + len(plain)] == plain), extra)
    start = whole[:begins] or [token for token in [tokenizer.eos_token_id] if token is not None]
    if not start:  # then nothing can predict the first token
        start, plain = plain[:1], plain[1:]
    if not plain:
        raise InvalidArgument(f"The text {item.text[:40]!r} has no token to predict.", reason="NOTHING_TO_ASK")
    most = context_tokens - 1 - len(start)  # one token is always generated
    pieces = [plain[at : at + most] for at in range(0, len(plain), most)]
    before = [start, *(piece[-1:] for piece in pieces)]
    return [
        Example([*known, *piece], [0] * len(known) + [1] * len(piece))
        for known, piece in zip(before, pieces, strict=False)
    ]


class _TooLongError(Exception):
    """An answer of a pair that the engine cannot score."""


def _pair(tokenizer: Tokenizer, context_tokens: int, item: Rank) -> list[Example]:
    """Prompt and answer of both as training renders them, cut to the context at the prompt's start, alike for both."""
    pair = render_preference(Preference(item.prompt, item.chosen, item.rejected, item.tools), tokenizer)
    both = (pair.chosen, pair.rejected)
    learned = [at for one in both for at, counts in enumerate(one.loss_mask) if counts]
    prompt_tokens = min(learned, default=0)
    longest = max(len(one.token_ids) for one in both) - prompt_tokens
    kept = context_tokens - 1 - longest  # one token is always generated
    if kept < 1:
        raise _TooLongError(f"An answer of the pair has {longest} tokens, and the context {context_tokens}.")
    cut = max(prompt_tokens - kept, 0)
    return [Example(one.token_ids[cut:], one.loss_mask[cut:]) for one in both]


async def _score(engine: Engine, asked: Asked, example: Example) -> float:
    """Negative log-probability of the tokens under `loss_mask`, summed, in nats."""
    body = {
        "model": asked.public_model,
        "prompt": list(example.token_ids),
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": 0,
    }
    told = await _generate(engine, asked, body, completions=True)
    positions = told["choices"][0]["prompt_logprobs"]
    return -sum(
        float(found[str(token)]["logprob"])
        for token, learned, found in zip(example.token_ids, example.loss_mask, positions, strict=True)
        if learned and found is not None  # nothing predicts the first token of all
    )


async def _generate(engine: Engine, asked: Asked, body: dict[str, Any], completions: bool) -> dict[str, Any]:
    """The answer's JSON. An engine that is away or overloaded is waited for.

    Raises FailedPrecondition for a refusal, Unavailable when the limit has passed.
    """
    request = engine_pb2.GenerateRequest(
        endpoint=engine_pb2.ENDPOINT_COMPLETIONS if completions else engine_pb2.ENDPOINT_CHAT_COMPLETIONS,
        body=json.dumps(body, ensure_ascii=False).encode(),
        adapter=asked.adapter,
        public_model=asked.public_model,
    )

    async def ask() -> engine_pb2.GenerateResponse:
        response = await answered(engine.generate(request, TIMEOUT_SECONDS))
        if response.http_status in (429, 503):
            raise Unavailable("The engine is overloaded.", reason="ENGINE_OVERLOADED")
        return response

    response = await patiently("The engine", ask, asked.limits)
    told: dict[str, Any] = json.loads(response.body)
    if response.http_status != 200:
        raise FailedPrecondition(
            f"{asked.public_model} refused a question (HTTP {response.http_status}): "
            f"{(told.get('error') or {}).get('message', 'no reason was given')}",
            reason="QUESTION_REFUSED",
        )
    return told
