"""The inference service on its own Ray cluster: Serve's gRPC proxy, a replica, vLLM and a tiny llama.

One stack for the folder, used in order: the tests that kill things come last.
"""

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from graft.domain.errors import FailedPrecondition, InvalidArgument, Unavailable
from graft.internal.engine_client import EngineClient
from graft.internal.token import engine_token
from graft.internal.v1 import engine_pb2
from graft.orchestrator.evaluating import Probe, score
from graft.serving.main import check_port
from tests.support.adapters import make_adapter
from tests.support.processes import held, slowed
from tests.support.serving_stack import (
    CAPACITY,
    Stack,
    adapter_ref,
    completion,
    descendants,
    request,
    titles,
)
from tests.support.token_contract import refuses_all_without

pytestmark = [pytest.mark.integration, pytest.mark.ray, pytest.mark.timeout(400)]

ANSWERING_SECONDS, HELD_SECONDS = 0.01, 0.1
"""In turn: a token or some in a tenth of a second, of 220."""


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[EngineClient]:
    client = stack.client()
    yield client
    await client.close()


async def answer(client: EngineClient, wanted: engine_pb2.GenerateRequest) -> dict[str, Any]:
    response = await client.generate(wanted, timeout_seconds=60)
    body: dict[str, Any] = json.loads(response.body)
    assert response.http_status == 200, body
    assert body["model"] == wanted.public_model
    return body


async def tokens(client: EngineClient, adapter: engine_pb2.AdapterRef | None, text: str) -> list[float]:
    """Fingerprint of a greedy answer: its log-probabilities, which no two adapters share."""
    body = await answer(client, request(adapter, text, logprobs=True))
    return [round(entry["logprob"], 1) for entry in body["choices"][0]["logprobs"]["content"]]


async def eventually(
    client: EngineClient, accept: Callable[[engine_pb2.Replica], bool], what: str
) -> engine_pb2.Replica:
    """The replica, once it is accepted."""
    deadline = time.monotonic() + 60
    while True:
        (replica,) = (await client.residency()).replicas
        if accept(replica):
            return replica
        assert time.monotonic() < deadline, f"{what}; last seen: {replica}"
        await asyncio.sleep(0.05)


async def test_whoever_has_no_token_is_refused_by_every_method(stack: Stack) -> None:
    await refuses_all_without(stack.settings.engine_address, engine_token(stack.settings))


async def test_a_client_without_the_token_is_told_that_the_service_does_not_take_it(stack: Stack) -> None:
    stranger = EngineClient(stack.settings.engine_address, token="0" * 64)
    wanted = request(None, "hi")
    try:
        with pytest.raises(Unavailable, match="GRAFT_SERVING_TOKEN_FILE") as caught:
            await stranger.generate(wanted, timeout_seconds=60)
        assert caught.value.reason == "ENGINE_TOKEN_REFUSED"
        with pytest.raises(Unavailable, match="GRAFT_SERVING_TOKEN_FILE"):
            _ = [piece async for piece in stranger.stream(engine_pb2.StreamRequest(request=wanted))]
    finally:
        await stranger.close()


def test_no_process_has_the_token_in_its_arguments_or_variables_and_no_log_tells_it(stack: Stack) -> None:
    token = engine_token(stack.settings)
    assert token
    for process in descendants(stack.folder):
        with suppress(psutil.NoSuchProcess):
            assert token not in " ".join([*process.cmdline(), *process.environ().values()]), process
    assert token not in (stack.folder / "serving.log").read_text()


async def test_no_application_answers_in_the_name_of_one_that_is_not_there(stack: Stack) -> None:
    # While there is only one, Ray Serve's proxy gives it every request, whichever application it names.
    connected = stack.client("tiny")
    other = connected.of("other")
    try:
        for asked in (
            other.generate(request(None, "hi"), timeout_seconds=60),
            other.load(stack.adapters["a"]),
            other.residency(),
        ):
            with pytest.raises(Unavailable) as refused:
                await asked
            assert refused.value.reason == "ENGINE_STARTING"
        with pytest.raises(Unavailable):
            async for _ in other.stream(engine_pb2.StreamRequest(request=request(None, "hi"))):
                pass
        (application,) = await connected.applications()
        assert (application.base_model, application.state) == ("tiny", engine_pb2.Application.STATE_RUNNING)
    finally:
        await connected.close()


def test_a_request_while_the_engine_starts_is_unavailable_with_a_retry_hint(stack: Stack) -> None:
    assert stack.refused_before_ready
    for error in stack.refused_before_ready:
        assert isinstance(error, Unavailable)
        assert error.reason == "ENGINE_STARTING"
        assert error.retry_after_seconds == 2.0


def test_the_internal_door_listens_on_loopback_only(stack: Stack) -> None:
    port = stack.settings.serving.grpc_port
    addresses = {
        listening.laddr.ip.removeprefix("::ffff:")
        for listening in psutil.net_connections("tcp")
        if listening.status == psutil.CONN_LISTEN and listening.laddr.port == port
    }
    assert addresses == {"127.0.0.1"}


async def test_base_and_adapters_answer_concurrently_and_each_as_itself(stack: Stack, client: EngineClient) -> None:
    who = [None, stack.adapters["a"], stack.adapters["b"]]
    alone = [await tokens(client, adapter, "hello") for adapter in who]
    assert len({tuple(answer) for answer in alone}) == 3
    together = await asyncio.gather(*(tokens(client, adapter, "hello") for adapter in who * 4))
    assert together == alone * 4


async def test_seeded_answers_to_long_prompts_do_not_end_the_engine(stack: Stack, client: EngineClient) -> None:
    del stack
    (before,) = (await client.residency()).replicas

    async def asked(seed: int) -> str:
        # Six of them are more than a step computes: some are computed in parts. None is another's in a cache.
        body = {"prompt": [7 + seed] * 200, "max_tokens": 4, "temperature": 1.0, "seed": seed}
        request = engine_pb2.GenerateRequest(
            endpoint=engine_pb2.ENDPOINT_COMPLETIONS, body=json.dumps(body).encode(), public_model="tiny"
        )
        response = await client.generate(request, timeout_seconds=60)
        assert response.http_status == 200, response.body
        return str(json.loads(response.body)["choices"][0]["text"])

    assert len(await asyncio.gather(*(asked(seed) for seed in range(6)))) == 6
    assert await asked(9) == await asked(9)
    (after,) = (await client.residency()).replicas
    assert (after.ready, after.engine_restarts) == (True, before.engine_restarts)


async def test_a_low_rank_delta_of_the_last_block_scores_as_the_base_with_that_change(
    stack: Stack, client: EngineClient, base: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from graft.training.delta import BaseWeights, become, extract, write_delta

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    probe = Probe([1, 20, 30, 40], [50, 60, 70], 0.0)
    before = _mean_logprob(model, probe)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in (*model.model.layers[-1].parameters(), *model.model.norm.parameters()):
            parameter.add_(0.1 * torch.randn_like(parameter))
    weights = BaseWeights(base, model)
    delta = extract(model, weights, 8)
    write_delta(delta, str(base), stack.folder / "delta")
    become(model, weights, delta)
    expected = _mean_logprob(model, probe)
    assert abs(expected - before) > 0.05
    ref = adapter_ref("delta", stack.folder / "delta")
    assert await score(client, ref, probe) == pytest.approx(expected, abs=0.01)
    await client.unload(ref.digest)


def _mean_logprob(model: Any, probe: Probe) -> float:
    import torch

    first = len(probe.prompt_token_ids)
    tokens = [*probe.prompt_token_ids, *probe.completion_token_ids]
    with torch.no_grad():
        scores = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return sum(float(scores[first + n - 1, token]) for n, token in enumerate(probe.completion_token_ids)) / 3


async def test_an_answer_is_streamed_piece_by_piece(stack: Stack, client: EngineClient) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True, "max_tokens": 200}
    wanted = request(stack.adapters["a"], "hello", **options)
    pieces = []
    async for piece in client.stream(engine_pb2.StreamRequest(request=wanted)):
        assert piece.http_status == 200
        pieces.append(json.loads(piece.data))
    assert {piece["model"] for piece in pieces} == {"tiny:a@1"}
    assert pieces[-1]["usage"]["completion_tokens"] == 200
    # A token each, but where a busy machine, or a replica that imports for its first request, lets some come together.
    # An answer in one lump is three: the role, the text, and the usage.
    assert len(pieces) > 3


async def test_a_client_that_goes_away_frees_the_engine(stack: Stack, client: EngineClient) -> None:
    wanted = request(stack.adapters["a"], "hello", max_tokens=200, ignore_eos=True)
    async for _ in client.stream(engine_pb2.StreamRequest(request=wanted)):
        break
    deadline = time.monotonic() + 10
    while any(held.active_requests for held in (await client.residency()).replicas[0].adapters):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("endpoint", ["chat", "completion"])
async def test_an_answer_can_be_constrained_to_a_choice(stack: Stack, client: EngineClient, endpoint: str) -> None:
    choice = {"structured_outputs": {"choice": ["positive", "negative"]}, "max_tokens": 16}
    if endpoint == "chat":
        body = await answer(client, request(stack.adapters["b"], "good or bad?", **choice))
        text = body["choices"][0]["message"]["content"]
    else:
        text = (await answer(client, completion(stack.adapters["b"], "good or bad?", **choice)))["choices"][0]["text"]
    assert text in ("positive", "negative")


async def test_token_ids_are_scored_as_given(stack: Stack, client: EngineClient) -> None:
    body = await answer(client, completion(stack.adapters["a"], [5, 6, 7, 8], max_tokens=1, prompt_logprobs=0))
    scored = body["choices"][0]["prompt_logprobs"]
    assert [next(iter(entry)) for entry in scored[1:]] == ["6", "7", "8"]
    echoed = await answer(client, completion(stack.adapters["a"], [5, 6, 7, 8], max_tokens=1, echo=True, logprobs=0))
    assert echoed["choices"][0]["logprobs"]["token_logprobs"][1:4] == pytest.approx(
        [next(iter(entry.values()))["logprob"] for entry in scored[1:]]
    )


@pytest.mark.parametrize("stream", [False, True])
async def test_what_the_handler_refuses_is_openais_error_object(
    stack: Stack, client: EngineClient, stream: bool
) -> None:
    wanted = request(stack.adapters["a"], "hello", max_tokens=-1)
    if stream:
        (piece,) = [piece async for piece in client.stream(engine_pb2.StreamRequest(request=wanted))]
        status, body = piece.http_status, json.loads(piece.data)
    else:
        response = await client.generate(wanted, timeout_seconds=60)
        status, body = response.http_status, json.loads(response.body)
    assert status == 400
    assert body["error"]["param"] == "max_tokens"


async def test_a_bad_adapter_fails_its_own_request_and_the_engine_goes_on(
    stack: Stack, client: EngineClient, base: Path
) -> None:
    truncated = make_adapter(base, stack.folder / "truncated", seed=9)
    ref = adapter_ref("truncated", truncated)
    weights = truncated / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    missing = engine_pb2.AdapterRef(model="tiny:gone@1", digest="sha256:gone", path=str(stack.folder / "gone"))
    swapped = engine_pb2.AdapterRef(model="tiny:swapped@1", digest="sha256:00", path=stack.adapters["a"].path)
    wide = adapter_ref("wide", make_adapter(base, stack.folder / "wide", seed=9, rank=32))
    for bad, fault in (
        (ref, "truncated"), (missing, "does not exist"), (swapped, "digest"), (wide, "max_lora_rank of 16")
    ):  # fmt: skip
        results = await asyncio.gather(
            answer(client, request(None, "hello")),
            client.generate(request(bad, "hello"), timeout_seconds=60),
            client.load(bad),
            answer(client, request(stack.adapters["a"], "hello")),
            return_exceptions=True,
        )
        for refused in results[1:3]:
            assert isinstance(refused, FailedPrecondition)
            assert refused.reason == "ADAPTER_INVALID"
            assert fault in refused.message
            assert bad.model in refused.message
        assert isinstance(results[0], dict), results[0]
        assert isinstance(results[3], dict), results[3]
    (replica,) = (await client.residency()).replicas
    assert replica.engine_restarts == 0


async def test_more_adapters_than_the_engine_holds_all_answer_and_the_oldest_leave(
    stack: Stack, client: EngineClient
) -> None:
    for name in ("a", "b", "c"):
        await client.load(stack.adapters[name])
    alone = {name: await tokens(client, stack.adapters[name], "hello") for name in ("a", "b", "c", "d", "e")}
    (replica,) = (await client.residency()).replicas
    assert replica.capacity == CAPACITY
    assert [held.model for held in replica.adapters] == ["tiny:e@1", "tiny:d@1", "tiny:c@1"]
    names = ["a", "b", "c", "d", "e"] * 3
    answers = await asyncio.gather(*(tokens(client, stack.adapters[name], "hello") for name in names))
    assert answers == [alone[name] for name in names]


async def test_an_unloaded_adapter_is_out_and_comes_back_on_demand(stack: Stack, client: EngineClient) -> None:
    loaded = await client.load(stack.adapters["a"])
    assert loaded.load_seconds < 5
    (replica,) = (await client.unload(stack.adapters["a"].digest)).replicas
    assert "tiny:a@1" not in {held.model for held in replica.adapters}
    await answer(client, request(stack.adapters["a"], "hello"))


async def test_a_killed_engine_is_replaced_and_its_adapters_come_back(stack: Stack, client: EngineClient) -> None:
    await client.load(stack.adapters["a"])
    before = await tokens(client, stack.adapters["a"], "hello")
    (held_before,) = (await client.residency()).replicas
    core = stack.engine_core()
    server = core.parent()
    assert server is not None
    core.kill()
    await eventually(
        client, lambda replica: replica.engine_restarts > held_before.engine_restarts, "its end is noticed"
    )
    with held([server, *server.children()]), pytest.raises(Unavailable) as caught:  # the next one does not start yet
        await client.generate(request(None, "hello"), timeout_seconds=60)
    assert caught.value.reason == "ENGINE_RESTARTING"
    assert caught.value.retry_after_seconds == 2.0
    started = time.monotonic()
    replica = await eventually(client, lambda replica: replica.ready, "the engine is replaced")
    print(f"engine replaced after {time.monotonic() - started:.1f} s")
    assert {held.model for held in replica.adapters} == {held.model for held in held_before.adapters}
    assert all(held.in_engine for held in replica.adapters)
    assert await tokens(client, stack.adapters["a"], "hello") == before


async def test_an_engine_killed_while_it_answers_ends_the_answer_with_unavailable(
    stack: Stack, client: EngineClient
) -> None:
    wanted = request(stack.adapters["a"], "hello", max_tokens=220, ignore_eos=True)
    (before,) = (await client.residency()).replicas
    core = stack.engine_core()

    async def kill_while_streaming() -> None:
        async for _ in client.stream(engine_pb2.StreamRequest(request=wanted)):
            core.kill()

    # A tiny model would write the rest before it is killed.
    with slowed([core], ANSWERING_SECONDS, HELD_SECONDS), pytest.raises(Unavailable) as caught:
        await kill_while_streaming()
    assert caught.value.reason == "ENGINE_RESTARTING"
    await eventually(
        client, lambda replica: replica.ready and replica.engine_restarts > before.engine_restarts, "it is replaced"
    )


def test_memory_of_the_serving_processes_is_told(stack: Stack) -> None:
    total = 0
    for process in descendants(stack.folder):
        with suppress(psutil.NoSuchProcess):  # Ray ends workers that it has no use for
            pss = process.memory_full_info().pss
            total += pss
            print(f"{pss / 2**20:7.0f} MiB  {' '.join(process.cmdline())[:100]}")
    print(f"{total / 2**20:7.0f} MiB in all; ready after {stack.ready_seconds:.1f} s")
    assert total < 8 * 2**30


def test_a_taken_port_is_one_sentence_that_names_the_setting(stack: Stack) -> None:
    with pytest.raises(InvalidArgument, match="GRAFT_SERVING_GRPC_PORT"):
        check_port("127.0.0.1", stack.settings.serving.grpc_port)


async def test_a_killed_replica_takes_its_engine_along_and_is_replaced(stack: Stack, client: EngineClient) -> None:
    core = stack.engine_core()
    server = core.parent()
    assert server is not None
    replica = server.parent()
    assert replica is not None
    replica.kill()
    gone, alive = psutil.wait_procs([core, server], timeout=20)
    assert not alive, gone
    deadline = time.monotonic() + 90
    while True:
        try:
            (state,) = (await client.residency()).replicas
            if state.ready:
                break
        except Unavailable:
            pass
        assert time.monotonic() < deadline
        await asyncio.sleep(0.2)
    await answer(client, request(stack.adapters["a"], "hello"))


def test_nothing_of_the_service_is_left_after_sigterm(stack: Stack) -> None:
    core = stack.engine_core()
    server = core.parent()
    assert server is not None
    replica = server.parent()
    assert replica is not None
    stack.process.send_signal(signal.SIGTERM)
    assert stack.process.wait(40) == 0
    _, alive = psutil.wait_procs([core, server, replica], timeout=10)
    assert not alive
    deadline = time.monotonic() + 20
    while any(word in (left := " ".join(titles(descendants(stack.folder)))) for word in ("forkserver", "Serve")):
        assert time.monotonic() < deadline, left  # Ray has been told to end them, and does
        time.sleep(0.1)
