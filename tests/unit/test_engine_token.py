"""The internal gRPC's token: who is let in, what the others are told, and that users are never blamed for it."""

import asyncio
import stat
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from ray.serve.grpc_util import RayServegRPCContext

from graft.domain.errors import FailedPrecondition, Unauthenticated, Unavailable
from graft.domain.jobs import Reinforcement
from graft.internal.engine_client import EngineClient
from graft.internal.token import (
    VARIABLE,
    TakenTokens,
    check,
    engine_token,
    host_token,
    metadata,
    own_token_file,
    read_tokens,
)
from graft.internal.v1 import engine_pb2
from graft.serving.app import EngineReplica
from graft.settings import Settings, load
from graft.stack.backends import check_engine
from graft.stack.machine import State
from graft.stack.processes import described, local_stack
from graft.training.rollouts import EngineSampler, Patience
from tests.support.fake_engine import fake_engine
from tests.support.http_gateways import http_gateway
from tests.support.token_contract import SERVICE, WRONG, refuses_all_without

TOKEN = "5f" * 32


def token_in(folder: Path, text: str = TOKEN) -> Path:
    file = folder / "token"
    file.write_text(text)
    return file


def settings_in(home: Path, **variables: object) -> Settings:
    return load({"GRAFT_HOME": str(home), **{f"GRAFT_{name}": str(value) for name, value in variables.items()}})


async def test_an_engine_with_a_token_refuses_every_call_without_it() -> None:
    async with fake_engine(token=TOKEN) as engine:
        await refuses_all_without(engine.address, TOKEN)
        assert engine.requests == []


async def test_the_right_token_opens_calls_and_streams_of_every_application() -> None:
    async with fake_engine(token=TOKEN) as engine:
        client = EngineClient(engine.address, "smollm2-135m", token=TOKEN)
        request = engine_pb2.GenerateRequest(body=b'{"prompt": "hi"}')
        assert (await client.of("smollm2-135m").generate(request, 5)).http_status == 200
        assert [piece async for piece in client.stream(engine_pb2.StreamRequest(request=request))]
        assert len((await client.residency()).replicas) == 1
        await client.close()


@pytest.mark.parametrize("token", ["", WRONG])
async def test_a_client_with_another_token_hears_of_it_as_a_fault_of_the_service(token: str) -> None:
    async with fake_engine(token=TOKEN) as engine:
        client = EngineClient(engine.address, token=token)
        request = engine_pb2.GenerateRequest(body=b'{"prompt": "hi"}')
        for ask in (client.residency(), client.generate(request, 5), _all(client, request)):
            with pytest.raises(Unavailable, match="token") as caught:
                await ask
            assert caught.value.reason == "ENGINE_TOKEN_REFUSED"
            assert VARIABLE in caught.value.message
        await client.close()


async def _all(client: EngineClient, request: engine_pb2.GenerateRequest) -> None:
    _ = [piece async for piece in client.stream(engine_pb2.StreamRequest(request=request))]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_user_is_told_unavailable_when_the_gateway_has_another_token(tmp_path: Path, stream: bool) -> None:
    async with fake_engine(token=TOKEN) as locked, http_gateway(tmp_path, engine_address=locked.address) as it:
        body = {"model": "smollm2-135m", "prompt": "hi", "stream": stream}
        answer = await it.raw.post("/v1/completions", json=body)
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "engine_token_refused"


class _ServeContext(RayServegRPCContext):
    """What Ray Serve hands to a replica of a call with this metadata."""

    def __init__(self, brought: tuple[tuple[str, str], ...]) -> None:
        self._invocation_metadata = list(brought)
        self._trailing_metadata = [("request_id", "r-1")]
        self._code: Any = None
        self._details = ""


@pytest.mark.parametrize("method", SERVICE.methods, ids=lambda method: method.name)
async def test_each_method_of_a_replica_asks_for_the_token_before_it_does_anything(method: Any, tmp_path: Path) -> None:
    replica = SimpleNamespace(tokens=TakenTokens(token_in(tmp_path)))  # whatever else a method uses is missing

    async def ask(context: _ServeContext) -> None:
        answer = getattr(EngineReplica, method.name)(replica, None, grpc_context=context)
        _ = [piece async for piece in answer] if method.server_streaming else await answer

    refused = _ServeContext((("application", "graft-engine"), *metadata(WRONG)))
    await ask(refused)
    assert refused.code() is grpc.StatusCode.UNAUTHENTICATED
    assert [key for key, _ in refused.trailing_metadata()] == ["request_id", "grpc-status-details-bin"]
    taken = _ServeContext(metadata(TOKEN))
    with suppress(AttributeError):
        await ask(taken)
    assert taken.code() is None


@pytest.mark.parametrize("brought", ["", "Bearer", f"bearer {TOKEN}", f"Bearer {TOKEN} ", "Bearer ünïcode"])
def test_only_the_token_itself_is_taken(brought: str) -> None:
    with pytest.raises(Unauthenticated):
        check([TOKEN], [("authorization", brought)])
    check([TOKEN], metadata(TOKEN))


def test_each_line_of_a_file_must_be_one_long_word_and_the_first_is_what_is_sent(tmp_path: Path) -> None:
    assert read_tokens(None) == ()
    assert read_tokens(token_in(tmp_path, f"{TOKEN}\n")) == (TOKEN,)
    two = token_in(tmp_path, f"{TOKEN}\r\n\n{WRONG}")
    assert read_tokens(two) == (TOKEN, WRONG)
    assert engine_token(settings_in(tmp_path, SERVING_TOKEN_FILE=two)) == TOKEN
    for text in ("", "short", f"{TOKEN}\nshort", f"{TOKEN} {TOKEN}", f"{TOKEN}é"):
        with pytest.raises(FailedPrecondition, match=VARIABLE) as caught:
            read_tokens(token_in(tmp_path, text))
        assert not text or text not in caught.value.message.replace(str(tmp_path), "")
    with pytest.raises(FailedPrecondition, match=r"nowhere.*No such file"):
        read_tokens(tmp_path / "nowhere")


async def test_a_token_follows_another_without_a_restart_of_the_engine_or_a_refused_call(tmp_path: Path) -> None:
    old, new = metadata(TOKEN), metadata(WRONG)
    file = token_in(tmp_path)
    replica = SimpleNamespace(tokens=TakenTokens(file))

    async def taken(brought: tuple[tuple[str, str], ...]) -> bool:
        context = _ServeContext(brought)
        with suppress(AttributeError):
            await EngineReplica.Residency(replica, None, grpc_context=context)  # type: ignore[call-arg, arg-type, misc]
        return context.code() is None

    assert [await taken(old), await taken(new)] == [True, False]
    for text, expected in (
        (f"{TOKEN}\n{WRONG}\n", [True, True]),  # added
        (f"{WRONG}\n{TOKEN}\n", [True, True]),  # sent by those who start now
        (f"{WRONG}\n", [False, True]),  # the old one removed
        ("", [False, True]),  # a mistake opens no door, and closes none
        (None, [False, True]),
    ):
        file.unlink()
        if text is not None:
            token_in(tmp_path, text)
        assert [await taken(old), await taken(new)] == expected, text


def test_a_stack_of_one_machine_makes_a_token_that_its_user_alone_may_read(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    assert engine_token(settings) == ""  # nothing is written by looking
    stack = {process.name: process for process in local_stack(settings)}
    file = own_token_file(settings)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    token = engine_token(settings)
    assert len(token) == 64
    # Training workers inherit it from the head; no process is told the token itself.
    assert stack["ray"].environment[VARIABLE] == str(file)
    assert token not in str([(process.argv, process.environment) for process in stack.values()])
    local_stack(settings)
    assert engine_token(settings) == token


@pytest.mark.parametrize(
    "elsewhere",
    [{"SERVING_ADDRESS": "engine:9000"}, {"ORCHESTRATOR_RAY_ADDRESS": "head:6379"}, {"RAY_HOST": "10.0.0.1"}],
)
def test_what_several_machines_share_has_a_token_only_when_one_is_named(
    tmp_path: Path, elsewhere: dict[str, str]
) -> None:
    local_stack(settings_in(tmp_path, **elsewhere))
    assert engine_token(settings_in(tmp_path, **elsewhere)) == ""
    named = settings_in(tmp_path, SERVING_TOKEN_FILE=token_in(tmp_path), **elsewhere)
    assert engine_token(named) == TOKEN
    assert not own_token_file(named).exists()


def test_a_node_of_ray_finds_the_token_by_the_variable_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert host_token() == ""
    monkeypatch.setenv(VARIABLE, str(token_in(tmp_path)))
    assert host_token() == TOKEN
    monkeypatch.setenv(VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(FailedPrecondition, match=VARIABLE):
        host_token()


async def test_a_rollout_says_of_a_refused_token_which_setting_it_is() -> None:
    told: list[str] = []
    async with fake_engine(token=TOKEN) as engine:
        patience = Patience(lambda _kind, data: told.append(data["message"]), limit_seconds=0.2)
        asked = Reinforcement(group_size=1, max_completion_tokens=4, temperature=1.0)
        sampler = EngineSampler(EngineClient(engine.address), "smollm2-135m", asked, patience)
        try:
            with pytest.raises(Unavailable, match=VARIABLE):
                await asyncio.to_thread(sampler.sample, [[1]], [0], None)
        finally:
            await asyncio.to_thread(sampler.close)
    assert VARIABLE in told[0]


async def test_the_doctor_tells_a_missing_a_wrong_and_an_unreadable_token_apart(tmp_path: Path) -> None:
    async with fake_engine(token=TOKEN) as engine:
        found = {
            name: await asyncio.to_thread(
                check_engine, settings_in(tmp_path, SERVING_ADDRESS=engine.address, **variables)
            )
            for name, variables in {
                "right": {"SERVING_TOKEN_FILE": token_in(tmp_path)},
                "missing": {},
                "unreadable": {"SERVING_TOKEN_FILE": tmp_path / "nowhere"},
            }.items()
        }
        wrong = settings_in(tmp_path, SERVING_ADDRESS=engine.address, SERVING_TOKEN_FILE=token_in(tmp_path, WRONG))
        found["wrong"] = await asyncio.to_thread(check_engine, wrong)
    assert found["right"].state is State.OK
    assert "asks for a token" in found["missing"].message
    assert "another token" in found["wrong"].message
    assert "nowhere" in found["unreadable"].message
    for name in ("missing", "wrong", "unreadable"):
        assert found[name].state is State.FAIL
        assert VARIABLE in found[name].fix
        assert WRONG not in found[name].message


async def test_the_stack_knows_its_own_service_ready_by_its_token(tmp_path: Path) -> None:
    async with fake_engine(token=TOKEN) as engine:
        port = engine.address.rpartition(":")[2]
        for file, ready in ((token_in(tmp_path), True), (tmp_path / "nowhere", False)):
            settings = settings_in(tmp_path, SERVING_GRPC_PORT=port, SERVING_TOKEN_FILE=file)
            (probe,) = [process.probe for process in described(settings, {}) if process.name == "inference"]
            assert await asyncio.to_thread(probe) is ready
