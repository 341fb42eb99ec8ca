"""GenerationService: the typed request as an OpenAI body, and OpenAI's answer as the typed response."""

import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from graft.api.v1 import generation_pb2, generation_service_pb2, generation_service_pb2_grpc
from graft.domain.errors import FieldViolation, InvalidArgument
from graft.gateway.core import Core
from graft.gateway.generation import refusal
from graft.gateway.services.names import parent_project
from graft.internal.v1 import engine_pb2

DEFAULT_MAX_TOKENS = 128
"""As the contract says: long enough for an answer, short enough for a CPU."""


class GenerationService(generation_service_pb2_grpc.GenerationServiceServicer):
    """Answers prompts with a base model or one of its adapters."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def Generate(
        self, request: generation_service_pb2.GenerateRequest, _context: Any
    ) -> generation_service_pb2.GenerateResponse:
        """One answer."""
        endpoint, body = openai_body(request)
        answer = await self._core.generate(parent_project(request.parent), endpoint, body)
        if answer.http_status != 200:
            raise refusal(answer.http_status, answer.body)
        told = json.loads(answer.body)
        choice = told["choices"][0]
        return generation_service_pb2.GenerateResponse(
            model=told["model"],
            text=_text(choice, "message"),
            finish_reason=choice.get("finish_reason") or "",
            usage=_usage(told.get("usage")),
        )

    async def StreamGenerate(
        self, request: generation_service_pb2.StreamGenerateRequest, _context: Any
    ) -> AsyncIterator[generation_service_pb2.StreamGenerateResponse]:
        """Pieces with text as they come, then one last piece with the finish reason and the usage."""
        endpoint, body = openai_body(request.request)
        body["stream_options"] = {"include_usage": True}
        project = parent_project(request.request.parent, "request.parent")
        last = generation_service_pb2.StreamGenerateResponse()
        async with aclosing(self._core.stream(project, endpoint, body)) as payloads:
            async for payload in payloads:
                told = json.loads(payload)
                last.model = told.get("model") or last.model
                if told.get("usage"):
                    last.usage.CopyFrom(_usage(told["usage"]))
                for choice in told.get("choices", ()):
                    last.finish_reason = choice.get("finish_reason") or last.finish_reason
                    if text := _text(choice, "delta"):
                        yield generation_service_pb2.StreamGenerateResponse(model=last.model, text=text)
        yield last


def openai_body(
    request: generation_service_pb2.GenerateRequest,
) -> tuple[engine_pb2.Endpoint.ValueType, dict[str, object]]:
    """The endpoint and the body that mean the same. Raises InvalidArgument without a model or an input."""
    sampling = request.sampling
    body: dict[str, object] = {"model": request.model}
    if request.WhichOneof("input") != "inputs":  # else the task's own come first
        body |= {"max_tokens": DEFAULT_MAX_TOKENS, "temperature": 0.0}
    if sampling.HasField("max_tokens"):
        body["max_tokens"] = sampling.max_tokens
    if sampling.HasField("temperature"):
        body["temperature"] = sampling.temperature
    if sampling.HasField("top_p"):
        body["top_p"] = sampling.top_p
    if sampling.HasField("seed"):
        body["seed"] = sampling.seed
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if sampling.choices:
        body["structured_outputs"] = {"choice": list(sampling.choices)}
    if request.WhichOneof("input") == "chat":
        body["messages"] = [{"role": turn.role, "content": turn.content} for turn in request.chat.messages]
        return engine_pb2.ENDPOINT_CHAT_COMPLETIONS, body
    if request.WhichOneof("input") == "prompt":
        body["prompt"] = request.prompt
        return engine_pb2.ENDPOINT_COMPLETIONS, body
    if request.WhichOneof("input") == "inputs":
        body["inputs"] = dict(request.inputs.values)
        return engine_pb2.ENDPOINT_UNSPECIFIED, body
    raise InvalidArgument(
        "input: give `chat`, `prompt` or `inputs`.",
        reason="INPUT_REQUIRED",
        violations=(FieldViolation("input", "is required: chat, prompt or inputs"),),
    )


def _text(choice: dict[str, Any], part: str) -> str:
    return (choice[part].get("content") if part in choice else choice.get("text")) or ""


def _usage(told: dict[str, Any] | None) -> generation_pb2.Usage:
    told = told or {}
    return generation_pb2.Usage(
        prompt_tokens=told.get("prompt_tokens", 0), completion_tokens=told.get("completion_tokens") or 0
    )
