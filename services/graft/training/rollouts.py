"""The sampling side of reinforcement: completions of the platform's own inference service, and the policy it samples.

Owns the calls to the internal `Engine` service, their patience, and the event loop that they run in: training itself is
synchronous. Does not know rewards or losses (`graft.training.objectives.reinforcement`).
"""

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from graft.domain.errors import FailedPrecondition, ResourceExhausted, Unavailable
from graft.domain.jobs import EventLevel, Reinforcement
from graft.internal.engine_client import EngineClient
from graft.internal.v1 import engine_pb2
from graft.training.spec import Tell

T = TypeVar("T")

UNAVAILABLE_SECONDS = 600.0
"""How long the engine may be away before the run fails: a cold start takes two minutes, and nothing is lost."""
RETRY_SECONDS = 2.0
ANSWER_SECONDS = 600.0
"""For all completions of one prompt, which wait for those of the other prompts."""


@dataclass(frozen=True)
class Policy:
    """The policy as the engine holds it: an adapter that is in no registry. Each has a name and a path of its own."""

    model: str
    digest: str
    path: str


@dataclass(frozen=True)
class Completion:
    """One sampled completion of T tokens, its end token among them if it came to an end."""

    token_ids: tuple[int, ...]
    log_probs_T: tuple[float, ...]
    """What the sampler gave each token, in nats, at temperature 1: engines tell them before they divide."""
    text: str
    """Without special tokens."""
    cut: bool
    """Whether it had reached the limit of tokens."""


class Sampler(Protocol):
    """What samples. Calls block; `load` and `sample` raise Unavailable only after patience has run out."""

    def load(self, policy: Policy) -> None:
        """Makes a policy known before prompts name it."""
        ...

    def unload(self, policy: Policy) -> None:
        """Takes a policy out; its files may then be deleted. Does not wait for an engine that is away."""
        ...

    def sample(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], policy: Policy | None
    ) -> list[list[Completion]]:
        """A group of completions for each prompt, given as token ids. `policy` None: the base model."""
        ...

    def close(self) -> None:
        """Frees connections."""
        ...


class Patience:
    """Asks again while the answer is Unavailable; tells when the waiting begins and ends, once for all callers."""

    def __init__(self, tell: Tell, limit_seconds: float = UNAVAILABLE_SECONDS) -> None:
        self._tell = tell
        self._limit_seconds = limit_seconds
        self._waiting: set[str] = set()

    async def ask(self, what: str, ask: Callable[[], Awaitable[T]]) -> T:
        """`what` begins a sentence, as in "The engine". Raises Unavailable when the limit has passed."""
        started: float | None = None
        while True:
            try:
                answer = await ask()
            except (Unavailable, ResourceExhausted) as error:
                now = time.monotonic()
                started = now if started is None else started
                if now - started >= self._limit_seconds:
                    raise Unavailable(
                        f"{what} has been unavailable for {self._limit_seconds:.0f} s: {error.message}",
                        reason=error.reason,
                    ) from error
                self._begin(what, error.message)
                await asyncio.sleep(min(error.retry_after_seconds or RETRY_SECONDS, self._limit_seconds))
                continue
            self._end(what)
            return answer

    def _begin(self, what: str, message: str) -> None:
        if what in self._waiting:
            return
        self._waiting.add(what)
        text = f"{what} is not available: {message} Trying again for up to {self._limit_seconds:.0f} s."
        self._tell("message", {"message": text, "level": EventLevel.WARN.value})

    def _end(self, what: str) -> None:
        if what in self._waiting:
            self._waiting.discard(what)
            self._tell("message", {"message": f"{what} is available."})


class EngineSampler:
    """The platform's inference service as a sampler."""

    def __init__(self, client: EngineClient, base_model: str, asked: Reinforcement, patience: Patience) -> None:
        """`client` is that of `base_model`, and closed with this. `asked`: every value concrete."""
        self._base_model = base_model
        self._asked = asked
        self._patience = patience
        self._client = client
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine-sampler", daemon=True)
        self._thread.start()

    def load(self, policy: Policy) -> None:
        """Raises what the engine refuses the adapter with."""
        self._run(self._patience.ask("The engine", lambda: self._client.load(_ref(policy))))

    def unload(self, policy: Policy) -> None:
        """After its requests in flight have ended. Raises Unavailable at once."""
        self._run(self._client.unload(policy.digest))

    def sample(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], policy: Policy | None
    ) -> list[list[Completion]]:
        """All prompts are in flight at once. Raises FailedPrecondition SAMPLING_REFUSED with the engine's words."""

        async def all_of_them() -> list[list[Completion]]:
            return await asyncio.gather(
                *(self._group(prompt, seed, policy) for prompt, seed in zip(prompts, seeds, strict=True))
            )

        return self._run(all_of_them())

    def close(self) -> None:
        """Frees the connection and ends the thread."""
        self._run(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _group(self, prompt: Sequence[int], seed: int, policy: Policy | None) -> list[Completion]:
        asked = self._asked
        body = {
            "prompt": list(prompt),
            "n": asked.group_size,
            "max_tokens": asked.max_completion_tokens,
            "temperature": asked.temperature,
            "seed": seed,
            "logprobs": 0,
            "return_token_ids": True,
            # The policy itself and nothing else: a base model's own defaults for generation may cut or bend it.
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }
        public_model = self._base_model if policy is None else policy.model
        request = engine_pb2.GenerateRequest(
            endpoint=engine_pb2.ENDPOINT_COMPLETIONS,
            body=json.dumps(body).encode(),
            adapter=None if policy is None else _ref(policy),
            public_model=public_model,
            request_id=f"rollout-{public_model}-{seed}",
        )
        response = await self._patience.ask("The engine", lambda: self._generate(request))
        answer = json.loads(response.body)
        if response.http_status != 200:
            raise FailedPrecondition(
                f"The engine refused to sample: {answer.get('error', {}).get('message', 'without a reason')}",
                reason="SAMPLING_REFUSED",
            )
        return [_completion(choice) for choice in sorted(answer["choices"], key=lambda choice: int(choice["index"]))]

    async def _generate(self, request: engine_pb2.GenerateRequest) -> engine_pb2.GenerateResponse:
        response = await self._client.generate(request, ANSWER_SECONDS)
        if response.http_status in (429, 503):
            raise Unavailable("It is overloaded.", reason="ENGINE_OVERLOADED")
        return response

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def _ref(policy: Policy) -> engine_pb2.AdapterRef:
    return engine_pb2.AdapterRef(model=policy.model, digest=policy.digest, path=policy.path)


def _completion(choice: dict[str, Any]) -> Completion:
    token_ids = tuple(choice["token_ids"])
    log_probs_T = tuple(map(float, choice["logprobs"]["token_logprobs"]))
    if len(token_ids) != len(log_probs_T):
        raise FailedPrecondition(
            f"The engine answered {len(token_ids)} tokens with {len(log_probs_T)} log-probabilities.",
            reason="SAMPLING_REFUSED",
        )
    return Completion(token_ids, log_probs_T, choice["text"], choice["finish_reason"] == "length")
