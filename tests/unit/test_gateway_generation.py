"""Generation through the public gRPC door: names resolved above the engine, bodies as OpenAI's."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from graft.api.v1 import adapter_service_pb2, fine_tuning_job_pb2, generation_pb2
from graft.api.v1.adapter_service_pb2_grpc import AdapterServiceStub
from graft.api.v1.generation_service_pb2 import GenerateRequest, StreamGenerateRequest
from graft.api.v1.generation_service_pb2_grpc import GenerationServiceStub
from graft.domain.errors import FailedPrecondition, FieldViolation, InvalidArgument, NotFound, Unavailable
from graft.domain.jobs import ServedAs
from graft.domain.resources import BaseModel, RegistrySnapshot
from graft.internal.v1 import engine_pb2
from tests.support.gateways import BASE, base_model, drained, eventually, gateway, refused, registry


def chat(model: str, text: str = "hello", **sampling: Any) -> GenerateRequest:
    return GenerateRequest(
        model=model,
        chat=generation_pb2.ChatMessages(messages=[generation_pb2.ChatMessage(role="user", content=text)]),
        sampling=generation_pb2.SamplingParameters(**sampling),
    )


async def test_a_chat_with_the_base_model_uses_no_adapter_and_the_contracts_defaults(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        answer = await GenerationServiceStub(it.channel).Generate(chat(BASE))
        assert (answer.model, answer.text, answer.finish_reason) == (BASE, "[base] hello", "stop")
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 5)
        sent, body = it.engine.requests[0]
        assert sent.endpoint == engine_pb2.ENDPOINT_CHAT_COMPLETIONS
        assert sent.request_id.startswith("req-")
        assert not sent.HasField("adapter")
        assert body == {
            "model": BASE,
            "max_tokens": 128,
            "temperature": 0.0,
            "messages": [{"role": "user", "content": "hello"}],
        }


async def test_an_adapter_resolves_to_its_champion_a_number_or_an_alias(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        stub = GenerationServiceStub(it.channel)
        for model, version in ((f"{BASE}:reviews", 3), (f"{BASE}:reviews@1", 1), (f"{BASE}:reviews@champion", 3)):
            answer = await stub.Generate(GenerateRequest(model=model, prompt="hi"))
            assert answer.model == f"{BASE}:reviews@{version}"
            assert answer.text == f"[{BASE}:reviews@{version}] hi"
            sent, _ = it.engine.requests[-1]
            assert sent.adapter == engine_pb2.AdapterRef(
                model=f"{BASE}:reviews@{version}",
                registered_model=f"default--{BASE}--reviews",
                version=version,
                digest=f"sha256:{version:064x}",
            )


async def test_sampling_parameters_become_openais_and_zero_is_not_unset(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        request = GenerateRequest(model=BASE, prompt="Positive or negative?")
        request.sampling.max_tokens = 3
        request.sampling.temperature = 0.5
        request.sampling.top_p = 0.9
        request.sampling.seed = 0
        request.sampling.stop.append("\n")
        request.sampling.choices.extend(["positive", "negative"])
        await GenerationServiceStub(it.channel).Generate(request)
        sent, body = it.engine.requests[0]
        assert sent.endpoint == engine_pb2.ENDPOINT_COMPLETIONS
        assert body == {
            "model": BASE,
            "max_tokens": 3,
            "temperature": 0.5,
            "top_p": 0.9,
            "seed": 0,
            "stop": ["\n"],
            "structured_outputs": {"choice": ["positive", "negative"]},
            "prompt": "Positive or negative?",
        }


async def test_a_streamed_answer_ends_with_its_reason_and_usage(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        stub = GenerationServiceStub(it.channel)
        for request in (chat(f"{BASE}:reviews"), GenerateRequest(model=f"{BASE}:reviews", prompt="hello")):
            pieces = await drained(stub.StreamGenerate(StreamGenerateRequest(request=request)))
            assert "".join(piece.text for piece in pieces) == f"[{BASE}:reviews@3] one two three"
            assert len(pieces) == 5
            assert {piece.model for piece in pieces} == {f"{BASE}:reviews@3"}
            assert [piece.finish_reason for piece in pieces] == ["", "", "", "", "stop"]
            assert pieces[-1].usage.completion_tokens == 4


async def test_unknown_names_are_not_found_and_say_what_exists(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        stub = GenerationServiceStub(it.channel)
        for model, existing in (
            ("gpt-9", BASE),
            (f"{BASE}:summaries", "reviews"),
            (f"{BASE}:reviews@2", "3"),
            (f"{BASE}:reviews@shadow", "champion"),
        ):
            error = await refused(stub.Generate(chat(model)))
            assert isinstance(error, NotFound)
            assert existing in error.message
            streamed = await refused(drained(stub.StreamGenerate(StreamGenerateRequest(request=chat(model)))))
            assert streamed.message == error.message


async def test_a_request_for_a_base_model_that_is_not_served_is_refused_not_answered_by_another(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        other = BaseModel(**{**vars(base_model()), "id": "other-1b"})
        await it.store.replace_base_models([base_model(), other])
        error = await refused(GenerationServiceStub(it.channel).Generate(chat("other-1b")))
        assert isinstance(error, FailedPrecondition)
        assert error.metadata == {"base_model": "other-1b", "served": BASE}
        assert it.engine.requests == []


async def test_a_version_that_is_a_model_of_its_own_is_neither_asked_nor_loaded_in_the_shared_engine(
    tmp_path: Path,
) -> None:
    async with gateway(tmp_path) as it:
        known = registry()
        merged = replace(known.versions[1], served_as=ServedAs.MERGED_MODEL)
        await it.store.replace_registry(RegistrySnapshot(known.adapters, (known.versions[0], merged)))
        stub = AdapterServiceStub(it.channel)
        name = f"projects/default/baseModels/{BASE}/adapters/reviews/versions/3"
        load = adapter_service_pb2.LoadAdapterVersionRequest(name=name)
        for call in (
            GenerationServiceStub(it.channel).Generate(chat(f"{BASE}:reviews")),
            stub.LoadAdapterVersion(load),
        ):
            error = await refused(call)
            assert isinstance(error, FailedPrecondition)
            assert error.reason == "NOT_DEPLOYED"
            assert f"graft models deploy {BASE}:reviews@3" in error.message
        assert it.engine.requests == []
        found = await stub.GetAdapterVersion(adapter_service_pb2.GetAdapterVersionRequest(name=name))
        assert found.served_as == fine_tuning_job_pb2.SERVED_AS_MERGED_MODEL


async def test_a_request_without_model_or_input_names_the_field(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        stub = GenerationServiceStub(it.channel)
        for request, field in ((GenerateRequest(prompt="hi"), "model"), (GenerateRequest(model=BASE), "input")):
            error = await refused(stub.Generate(request))
            assert isinstance(error, InvalidArgument)
            assert [violation.field for violation in error.violations] == [field]


async def test_openais_refusal_becomes_a_field_violation(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        it.engine.refuse = 400
        stub = GenerationServiceStub(it.channel)
        for call in (
            stub.Generate(chat(BASE, top_p=7)),
            drained(stub.StreamGenerate(StreamGenerateRequest(request=chat(BASE)))),
        ):
            error = await refused(call)
            assert isinstance(error, InvalidArgument)
            assert error.message == "top_p must be in (0, 1]."
            assert [violation.field for violation in error.violations] == ["top_p"]


async def test_a_request_while_the_engine_starts_is_unavailable_with_a_hint(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        it.engine.error = Unavailable("The engine starts.", reason="ENGINE_STARTING", retry_after_seconds=2.0)
        stub = GenerationServiceStub(it.channel)
        for call in (
            stub.Generate(chat(BASE)),
            drained(stub.StreamGenerate(StreamGenerateRequest(request=chat(BASE)))),
        ):
            error = await refused(call)
            assert isinstance(error, Unavailable)
            assert (error.reason, error.retry_after_seconds) == ("ENGINE_STARTING", 2.0)


async def test_a_name_of_megabytes_comes_back_as_a_short_error(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        error = await refused(GenerationServiceStub(it.channel).Generate(chat("x" * 1_000_000)))
        assert isinstance(error, InvalidArgument)
        assert len(error.message) <= 1000


async def test_an_error_in_any_alphabet_stays_below_what_clients_accept(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        fault = FieldViolation("field" * 100, "\N{TEST TUBE}" * 1000)
        it.engine.error = InvalidArgument("\N{TEST TUBE}" * 1000, reason="BAD_ADAPTER", violations=(fault,) * 30)
        for _ in range(50):  # beyond the limit gRPC refuses with a probability, not always
            error = await refused(GenerationServiceStub(it.channel).Generate(chat(BASE)))
            assert len(error.violations) == 20


async def test_a_client_that_leaves_a_stream_frees_the_engine(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        it.engine.delay_seconds = 0.2
        call = GenerationServiceStub(it.channel).StreamGenerate(StreamGenerateRequest(request=chat(BASE)))
        assert (await call.read()).text == "[base] "
        call.cancel()
        await eventually(lambda: it.engine.abandoned == 1)


async def test_a_message_over_the_limit_is_refused(tmp_path: Path) -> None:
    async with gateway(tmp_path, GRAFT_GATEWAY_MAX_MESSAGE_BYTES="10000") as it:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await GenerationServiceStub(it.channel).Generate(chat(BASE, "x" * 20_000))
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
