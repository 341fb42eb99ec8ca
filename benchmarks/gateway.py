"""What the gateway costs: requests a second and time to the first token, by way of asking.

    python -m benchmarks.gateway [--quick]

Streamed chats by a closed loop of clients. Graft is asked over its public gRPC, over HTTP, and past the gateway at the
replica's own `Engine` service; `ray.serve.llm` serves the same folder with the same vLLM settings; vLLM's AsyncLLM is
asked in its own process. One stack is up at a time, and they take turns. A tiny llama makes the overhead visible; the
real base model shows what is left of it.
"""

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import aiohttp
from tests.support.serving_stack import descendants
from tests.support.tiny_llama import make_tiny_llama

from benchmarks.common import (
    Contestant,
    Report,
    answer_rounds,
    arguments,
    base_model,
    console,
    interleave,
    temporary_folder,
)
from benchmarks.load import Ask, Load, body, drive, fresh_seed, http_ask, questions, texts
from benchmarks.stacks import Stack, graft_stack
from graft.client import AsyncGraft
from graft.internal.engine_client import EngineClient
from graft.internal.token import engine_token
from graft.internal.v1 import engine_pb2

WAYS = {
    "graft-grpc": "Graft's gateway over gRPC (graft.client.AsyncGraft)",
    "graft-http": "Graft's gateway over HTTP, OpenAI's API",
    "engine-grpc": "Graft's replica past the gateway, over the internal Engine service",
    "ray-serve-llm": "ray.serve.llm.build_openai_app: streamed tokens not gathered, one ingress replica",
    "ray-serve-llm-direct": "the same with HAProxy, RAY_SERVE_THROUGHPUT_OPTIMIZED and direct streaming",
    "vllm": "vllm.v1 AsyncLLM in its own process, asked without a server",
}
GATEWAY_WAYS = ("graft-grpc", "graft-http")
GRAFT_WAYS = (*GATEWAY_WAYS, "engine-grpc")
PEERS = ("ray-serve-llm", "ray-serve-llm-direct", "vllm")
MAX_NUM_SEQS = 32


@dataclass(frozen=True)
class Plan:
    """One base model under load."""

    title: str
    base: Path
    context_tokens: int
    max_tokens: int
    in_flight: int
    requests: int
    alone: int
    """Requests one after the other, for the time to the first token without a queue."""
    turns: int
    """How often every stack is started."""
    rounds: int
    """In each turn."""


Play: TypeAlias = Callable[[str, list[str], int], Awaitable[Load]]
"""The way of asking, questions, and how many at once."""


class Table:
    """Figures by way, a value a round."""

    def __init__(self) -> None:
        self.requests: dict[str, list[float]] = defaultdict(list)
        self.loaded: dict[str, list[float]] = defaultdict(list)
        self.alone: dict[str, list[float]] = defaultdict(list)
        self.answers: dict[str, dict[str, str]] = {}

    async def fill(self, plan: Plan, ways: Sequence[str], play: Play) -> None:
        """All rounds of one turn."""
        for way in ways:
            self.answers[way] = (await play(way, questions(8, "same"), 4)).answers  # also warms it up
        for _, way in interleave(ways, plan.rounds):
            one_by_one = await play(way, questions(plan.alone, fresh_seed()), 1)
            together = await play(way, questions(plan.requests, fresh_seed()), plan.in_flight)
            self.alone[way].append(one_by_one.median_first_token_seconds * 1000)
            self.loaded[way].append(together.median_first_token_seconds * 1000)
            self.requests[way].append(together.requests_per_second)
            console.print(
                f"{plan.title}: {way} {self.requests[way][-1]:.1f} requests/s, first token after "
                f"{self.loaded[way][-1]:.1f} ms, alone {self.alone[way][-1]:.1f} ms"
            )


def main() -> int:
    """Returns 1 when two ways give different answers."""
    asked = arguments(__doc__)
    if asked.contestant:
        from benchmarks.gateway_contestants import CONTESTANTS

        return answer_rounds(CONTESTANTS[asked.contestant])

    quick = asked.quick
    report = Report(
        name="gateway",
        quick=quick,
        settings={"dtype": "float32", "max_num_seqs": MAX_NUM_SEQS, "temperature": 0, "stream": True},
        contestants=WAYS,
    )
    with temporary_folder() as folder:
        tiny = make_tiny_llama(folder / "tiny")
        turns, rounds = (1, 1) if quick else (2, 3)
        measure(report, Plan("tiny llama", tiny, 256, 16, 16, 32 if quick else 200, 8 if quick else 40, turns, rounds))
        real = Path(base_model().path)
        turns, rounds = (1, 1) if quick else (1, 3)
        measure(report, Plan("SmolLM2-135M", real, 512, 16, 8, 8 if quick else 32, 4 if quick else 12, turns, rounds))
    return report.finish()


def measure(report: Report, plan: Plan) -> None:
    """One base model, by every way."""
    table = Table()
    missing: dict[str, str] = {}
    for _ in range(plan.turns):
        variables = {
            "GRAFT_SERVING_DTYPE": "float32",
            "GRAFT_SERVING_CONTEXT_TOKENS": str(plan.context_tokens),
            "GRAFT_SERVING_MAX_NUM_SEQS": str(MAX_NUM_SEQS),
        }
        with graft_stack(variables, plan.base) as stack:
            asyncio.run(ask_graft(plan, table, stack))
        for way in PEERS:
            if way in missing:
                continue
            try:
                with peer(way, plan) as contestant:
                    asyncio.run(ask_peer(way, plan, table, contestant))
            except RuntimeError as error:  # the peer did not start: said in the result, not left out
                missing[way] = str(error).strip().splitlines()[-1]
                console.print(f"{way} could not be run: {error}", markup=False)
    for way, reason in missing.items():
        report.notes.append(f"{plan.title}: {way} could not be run: {reason}")
    report.settings[plan.title] = {
        "context_tokens": plan.context_tokens,
        "max_tokens": plan.max_tokens,
        "in_flight": plan.in_flight,
        "requests_a_round": plan.requests,
    }
    name = f"{plan.title}, {plan.in_flight} in flight"
    report.compare(f"{name}: requests", "requests/s", table.requests, ours=GATEWAY_WAYS)
    report.compare(f"{name}: first token", "ms", table.loaded, ours=GATEWAY_WAYS)
    report.compare(f"{plan.title}, alone: first token", "ms", table.alone, ours=GATEWAY_WAYS)
    reference = table.answers["engine-grpc"]
    for way, answers in table.answers.items():
        if way == "engine-grpc":
            continue
        different = [question for question, answer in answers.items() if answer != reference[question]]
        report.check(
            f"{plan.title}: {way} gives the answers of engine-grpc",
            not different,
            f"{len(answers) - len(different)} of {len(answers)} equal",
        )


async def ask_graft(plan: Plan, table: Table, stack: Stack) -> None:
    """Every way into Graft's own stack."""
    model = stack.settings.serving.base_model
    async with AsyncExitStack() as exits:
        graft = await exits.enter_async_context(AsyncGraft(stack.connection))
        session = await exits.enter_async_context(aiohttp.ClientSession())
        engine = EngineClient(stack.settings.engine_address, token=engine_token(stack.settings))
        exits.push_async_callback(engine.close)

        async def grpc_ask(question: str) -> AsyncIterator[str]:
            chat = [{"role": "user", "content": question}]
            async for piece in graft.stream(model, messages=chat, max_tokens=plan.max_tokens, temperature=0.0):
                if piece.text:
                    yield piece.text

        async def engine_ask(question: str) -> AsyncIterator[str]:
            request = engine_pb2.GenerateRequest(
                endpoint=engine_pb2.ENDPOINT_CHAT_COMPLETIONS,
                body=json.dumps(body(model, question, plan.max_tokens)).encode(),
                public_model=model,
                request_id=question,
            )
            async for response in engine.stream(engine_pb2.StreamRequest(request=request)):
                for text in texts(json.loads(response.data)):
                    yield text

        asks: dict[str, Ask] = {
            "graft-grpc": grpc_ask,
            "graft-http": http_ask(session, stack.http, model, plan.max_tokens),
            "engine-grpc": engine_ask,
        }
        await table.fill(plan, GRAFT_WAYS, lambda way, texts, at_once: drive(asks[way], texts, at_once))


async def ask_peer(way: str, plan: Plan, table: Table, contestant: Contestant) -> None:
    """`ray.serve.llm` over HTTP; or the engine without a server, whose clients loop in its own process."""

    async def play(_: str, asked: list[str], at_once: int) -> Load:
        return Load(**contestant.play({"questions": asked, "in_flight": at_once, "max_tokens": plan.max_tokens}))

    if way == "vllm":
        await table.fill(plan, [way], play)
        return
    base_url = contestant.play({})["base_url"]
    async with aiohttp.ClientSession() as session:
        ask = http_ask(session, base_url, "base", plan.max_tokens)
        await table.fill(plan, [way], lambda _, texts, at_once: drive(ask, texts, at_once))


@contextmanager
def peer(way: str, plan: Plan) -> Any:
    """A peer that is up. Whatever it leaves behind is ended."""
    with temporary_folder() as folder:
        variables = {
            "BENCHMARK_BASE": str(plan.base),
            "BENCHMARK_DTYPE": "float32",
            "BENCHMARK_CONTEXT_TOKENS": str(plan.context_tokens),
            "BENCHMARK_MAX_NUM_SEQS": str(MAX_NUM_SEQS),
            "BENCHMARK_RAY_FOLDER": str(folder / "ray"),
            # Said outright: left alone, Ray takes a token that it finds in the home.
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
            "GRAFT_TEST_STACK": str(folder),
        }
        try:
            with console.status(f"Starting {way}"):
                contestant = Contestant("benchmarks.gateway", way, folder / f"{way}.log", variables)
            with contestant:
                yield contestant
        finally:
            for left in descendants(folder):
                left.kill()


if __name__ == "__main__":
    raise SystemExit(main())
