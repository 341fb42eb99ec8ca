"""Puts an evaluation's questions to one contestant through the engine, many at once, and keeps every answer on disk.

Owns the requests and the file of answers, from which a restarted orchestrator goes on. Does not know what a good
answer is (`graft.evaluation`), nor whose turn it is (`graft.orchestrator.evaluations`).
"""

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from graft.data.questions import Ask, Grade, Predict, Prompt, Question, Questions, Rank, with_shots
from graft.data.rendering import Tokenizer, prompt_ids
from graft.domain.errors import FailedPrecondition, InvalidArgument, Unavailable
from graft.domain.resources import BaseModel
from graft.internal.v1 import engine_pb2
from graft.orchestrator.ports import Engine

TIMEOUT_SECONDS = 600.0
"""A queue of long answers on a CPU takes minutes; a client's own default is the same."""
CONCURRENCY = 16
"""Requests in flight. vLLM batches them; more would only wait in its queue."""
PATIENCE_SECONDS = 600.0
"""How long an engine may be away."""
RETRY_SECONDS = 2.0


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


@dataclass(frozen=True)
class Asked:
    """One contestant: who answers, what it is shown before each question, and how its answers are made."""

    adapter: engine_pb2.AdapterRef | None
    public_model: str
    base: BaseModel
    context_tokens: int
    """The engine's."""
    tokenizer: Tokenizer | None
    """The base's own; only where given texts are scored."""
    shots: tuple[Ask, ...]
    samples: int
    max_tokens: int
    seed: int = 0


def scores(questions: Questions) -> bool:
    """Whether given texts are scored, rather than answers generated."""
    return isinstance(questions.items[0], Rank | Predict)


class Answers:
    """The answers of one contestant: one JSON object a line, each written when it comes. Used by one task."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.found: dict[int, Answer] = {}
        if path.is_file():
            for line in path.read_text().splitlines():
                try:
                    answer = Answer(**{name: _frozen(value) for name, value in json.loads(line).items()})
                except (ValueError, TypeError):  # a line that a killed process left half written
                    continue
                self.found[answer.row] = answer

    def keep(self, answer: Answer) -> None:
        """Writes an answer."""
        self.found[answer.row] = answer
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "a") as file:
            file.write(json.dumps(asdict(answer)) + "\n")


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


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
    told = await _generate(engine, asked, _body(asked, questions, item, prompt, row), isinstance(prompt, str))
    texts = tuple(_text(choice) for choice in told["choices"])
    tokens = int((told.get("usage") or {}).get("completion_tokens") or 0)
    return Answer(row, texts, generated_tokens=tokens, seconds=time.monotonic() - started)


async def _scored(engine: Engine, asked: Asked, row: int, item: Rank | Predict) -> Answer:
    started = time.monotonic()
    assert asked.tokenizer is not None
    if isinstance(item, Predict):
        texts = [_windows(asked.tokenizer, asked.context_tokens, item)]
    else:
        texts = [[pair] for pair in _answers(asked.tokenizer, asked.context_tokens, item)]
    nats: list[float] = []
    for windows in texts:
        nats.append(sum([await _score(engine, asked, before, scored) for before, scored in windows]))
    tokens = sum(len(scored) for _, scored in texts[0])
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


def _windows(tokenizer: Tokenizer, context_tokens: int, item: Predict) -> list[tuple[list[int], list[int]]]:
    """A text's token ids in pieces that fit the context, each with what comes before it: every token is scored once.

    The first token is predicted from the tokenizer's own beginning of a text or, where it has none, from the end of
    another, as `lm-eval` does (EleutherAI, rolling log-likelihood with one token of context).
    """
    plain = tokenizer.encode(item.text, add_special_tokens=False)
    whole = tokenizer.encode(item.text, add_special_tokens=True)
    start = whole[: len(whole) - len(plain)] or [token for token in [tokenizer.eos_token_id] if token is not None]
    if not start:  # then nothing can predict the first token
        start, plain = plain[:1], plain[1:]
    if not plain:
        raise InvalidArgument(f"The text {item.text[:40]!r} has no token to predict.", reason="NOTHING_TO_ASK")
    most = context_tokens - 1 - len(start)  # one token is always generated
    pieces = [plain[at : at + most] for at in range(0, len(plain), most)]
    return [(start if at == 0 else pieces[at - 1][-1:], piece) for at, piece in enumerate(pieces)]


def _answers(tokenizer: Tokenizer, context_tokens: int, item: Rank) -> list[tuple[list[int], list[int]]]:
    """Prompt and answer of both, cut to the context at the prompt's start, alike for both."""
    before = prompt_ids(item.prompt, tokenizer, item.tools)
    scored = [_completion_ids(tokenizer, item, answer, before) for answer in (item.chosen, item.rejected)]
    kept = context_tokens - 1 - max(map(len, scored))
    if kept < 1:
        raise InvalidArgument("An answer of a pair is longer than the engine's context.", reason="OVER_LENGTH_EXAMPLES")
    return [(before[-kept:], answer) for answer in scored]


def _completion_ids(tokenizer: Tokenizer, item: Rank, answer: Prompt, before: list[int]) -> list[int]:
    if isinstance(answer, str):
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        return tokenizer.encode(answer, add_special_tokens=False) + end
    assert not isinstance(item.prompt, str)
    whole = tokenizer.apply_chat_template([*item.prompt, *answer], tokenize=False, add_generation_prompt=False)
    ids = tokenizer.encode(whole.rstrip("\n"), add_special_tokens=False)
    if ids[: len(before)] != before:
        raise InvalidArgument(
            "The base model's chat template does not begin an answer where its prompt ends.",
            reason="CHAT_TEMPLATE_NOT_PREFIX_STABLE",
        )
    return ids[len(before) :]


async def _score(engine: Engine, asked: Asked, before: list[int], scored: list[int]) -> float:
    """Negative log-probability of `scored` after `before`, summed, in nats."""
    body = {
        "model": asked.public_model,
        "prompt": [*before, *scored],
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": 0,
    }
    told = await _generate(engine, asked, body, completions=True)
    positions = told["choices"][0]["prompt_logprobs"]
    return -sum(float(positions[len(before) + index][str(token)]["logprob"]) for index, token in enumerate(scored))


async def _generate(engine: Engine, asked: Asked, body: dict[str, Any], completions: bool) -> dict[str, Any]:
    """The answer's JSON. An engine that is away is waited for. Raises FailedPrecondition for a refusal."""
    request = engine_pb2.GenerateRequest(
        endpoint=engine_pb2.ENDPOINT_COMPLETIONS if completions else engine_pb2.ENDPOINT_CHAT_COMPLETIONS,
        body=json.dumps(body, ensure_ascii=False).encode(),
        adapter=asked.adapter,
        public_model=asked.public_model,
    )
    give_up = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            response = await engine.generate(request, TIMEOUT_SECONDS)
            if response.http_status not in (429, 503):
                break
        except Unavailable:
            if time.monotonic() > give_up:
                raise
        await asyncio.sleep(RETRY_SECONDS)
    told: dict[str, Any] = json.loads(response.body)
    if response.http_status != 200:
        raise FailedPrecondition(
            f"{asked.public_model} refused a question (HTTP {response.http_status}): "
            f"{(told.get('error') or {}).get('message', 'no reason was given')}",
            reason="QUESTION_REFUSED",
        )
    return told
