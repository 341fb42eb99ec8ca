"""One vLLM engine and its OpenAI handlers: the only module that knows vLLM's classes.

`Engine.build` blocks while the engine's process starts; everything else runs on the replica's event loop. An engine
that has died says so by `dead` and by Unavailable; replacing it is the keeper's work.
"""

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.lora.request import LoRARequest
from vllm.model_executor.models.registry import ModelRegistry
from vllm.platforms import current_platform
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger

from graft.domain.errors import FailedPrecondition, Unavailable
from graft.domain.resources import BaseModel
from graft.internal.v1 import engine_pb2
from graft.serving.executor import InCoreExecutor
from graft.serving.processes import fork_engine_cores
from graft.serving.residency import DIED, RETRY_SECONDS
from graft.settings import ServingSettings

GIB = 1024**3
MAX_BATCHED_TOKENS = 512
"""Prompt tokens a step: about a second of two AVX2 cores at 135M parameters, for which others' tokens wait."""


@dataclass(frozen=True)
class Answer:
    """An OpenAI object, and the HTTP status that goes with it."""

    http_status: int
    body: dict[str, Any]

    def json(self) -> bytes:
        """The object as it goes over the wire."""
        return json.dumps(self.body, ensure_ascii=False, separators=(",", ":")).encode()


def resolve_dtype(dtype: str) -> str:
    """`auto` as float32 on a CPU without AMX, where it is the faster one (ADR 7)."""
    if dtype != "auto" or not current_platform.is_cpu():
        return dtype
    return "bfloat16" if torch.cpu._is_amx_tile_supported() else "float32"


def engine_args(settings: ServingSettings, base: BaseModel) -> AsyncEngineArgs:
    """vLLM's arguments. Each that is not a setting has its reason here."""
    cpu = current_platform.is_cpu()
    return AsyncEngineArgs(
        model=base.path,
        served_model_name=base.id,
        dtype=resolve_dtype(settings.dtype),
        max_model_len=min(settings.context_tokens, base.context_tokens),
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=max(MAX_BATCHED_TOKENS, settings.max_num_seqs),
        kv_cache_memory_bytes=settings.kv_cache_gib * GIB if cpu else None,
        # On a CPU, the share of the machine's memory that must be free at start; the KV cache has its own size.
        gpu_memory_utilization=0.3 if cpu else 0.9 * (settings.pool(base.id).gpus or 1),
        # vLLM's CPU platform turns compilation off with LoRA anyway; saying so spares its warm-up.
        enforce_eager=cpu,
        distributed_executor_backend=InCoreExecutor if cpu else None,
        enable_prefix_caching=True,
        enable_lora=True,
        max_loras=settings.max_loras,
        max_cpu_loras=max(settings.max_cpu_loras, settings.max_loras),
        max_lora_rank=settings.max_lora_rank,
        disable_log_stats=True,  # to the log; `_Metrics` counts
        use_tqdm_on_load=False,
    )


class _Metrics(RayPrometheusStatLogger):  # type: ignore[misc]  # vLLM has no types
    """vLLM's own metrics, which leave by the endpoint of the Ray node, as `ray_vllm_…`."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int] | None = None) -> None:
        super().__init__(vllm_config, engine_indexes)
        # A series for each set of adapters that ever ran at once: with hundreds of adapters they would fill the node's
        # memory and Prometheus. Residency tells what is held.
        self.gauge_lora_info = None


class Engine:
    """A running engine. Adapters are named by `add`, and requests name them as their `model`."""

    def __init__(self, llm: AsyncLLM, base: BaseModel) -> None:
        self._llm = llm
        self._base_id = base.id
        self._models = OpenAIServingModels(llm, [BaseModelPath(name=base.id, model_path=base.path)])
        template: dict[str, Any] = {"chat_template": None, "chat_template_content_format": "auto"}
        renderer = OnlineRenderer(llm.model_config, llm.renderer, request_logger=None, **template)
        shared: dict[str, Any] = {"online_renderer": renderer, "request_logger": None}
        self._chat = OpenAIServingChat(llm, self._models, "assistant", **shared, **template)
        self._completion = OpenAIServingCompletion(llm, self._models, **shared)

    @classmethod
    def build(cls, settings: ServingSettings, base: BaseModel) -> "Engine":
        """Starts the engine's process and waits until the model is loaded. Blocks: call it from a thread."""
        fork_engine_cores()
        for architecture in json.loads((Path(base.path) / "config.json").read_bytes())["architectures"]:
            if architecture in ModelRegistry.models:
                # Loaded here in 0.1 s. Unloaded, vLLM starts a whole Python process (8 s) to ask the class what it is.
                ModelRegistry.register_model(architecture, ModelRegistry.models[architecture].load_model_cls())
        return cls(AsyncLLM.from_engine_args(engine_args(settings, base), stat_loggers=[_Metrics]), base)

    @property
    def dead(self) -> bool:
        """True once the engine's process has ended or has given up."""
        return bool(self._llm.engine_core.resources.engine_dead) or bool(self._llm.errored and self._llm.output_handler)

    @property
    def dtype(self) -> str:
        """What it computes in, for example `bfloat16`."""
        return str(self._llm.model_config.dtype).removeprefix("torch.")

    def close(self) -> None:
        """Ends the engine's process. Blocks for a moment."""
        self._llm.shutdown(timeout=2)

    async def add(self, name: str, int_id: int, path: Path) -> None:
        """Loads a proven adapter. Raises FailedPrecondition if vLLM refuses it, Unavailable if the engine died."""
        lora = LoRARequest(lora_name=name, lora_int_id=int_id, lora_path=str(path))
        try:
            loaded = await self._llm.add_lora(lora)
        except EngineDeadError:
            raise _died() from None
        # vLLM passes on whatever its worker raised, as a bare Exception.
        except Exception as error:
            if self.dead:
                raise _died() from None
            raise FailedPrecondition(
                f"The engine refused the adapter: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
                reason="ADAPTER_INVALID",
            ) from error
        if not loaded:
            raise FailedPrecondition("The engine refused the adapter without a reason.", reason="ADAPTER_INVALID")
        self._models.lora_requests[name] = lora

    async def remove(self, name: str, int_id: int) -> None:
        """Takes an adapter out of the slots and out of the host's memory."""
        self._models.lora_requests.pop(name, None)
        if not self.dead:
            try:
                await self._llm.remove_lora(int_id)
            except EngineDeadError:
                return

    async def generate(self, endpoint: int, body: bytes, model: str | None, public_model: str) -> Answer:
        """Answers an OpenAI body by vLLM's handler; `model` is an adapter's engine name, None for the base.

        What the handler refuses is an answer too, with OpenAI's error object. Raises Unavailable if the engine dies,
        and vLLM's own defects as they are.
        """
        try:
            result = await self._handle(endpoint, self._parse(endpoint, body, model, stream=False))
        except EngineDeadError:
            raise _died() from None
        # vLLM's handlers raise what its HTTP server maps to a status; `_refused` asks the same mapping.
        except Exception as error:  # noqa: BLE001
            return self._refused(error, model, public_model)
        if isinstance(result, ErrorResponse):
            return self._refused(result, model, public_model)
        answer = result.model_dump(mode="json")
        answer["model"] = public_model
        return Answer(200, answer)

    async def stream(
        self, endpoint: int, body: bytes, model: str | None, public_model: str
    ) -> AsyncGenerator[Answer, None]:
        """Like `generate`, piece by piece. A refusal is the only item, or the last one."""
        try:
            chunks = await self._handle(endpoint, self._parse(endpoint, body, model, stream=True))
        except EngineDeadError:
            raise _died() from None
        except Exception as error:  # noqa: BLE001  # as above
            yield self._refused(error, model, public_model)
            return
        if isinstance(chunks, ErrorResponse):
            yield self._refused(chunks, model, public_model)
            return
        async with aclosing(chunks):
            async for chunk in chunks:
                data = chunk.removeprefix("data: ").strip()
                if data == "[DONE]":
                    return
                piece = json.loads(data)
                if "error" in piece:
                    # The handler turns every exception into an error piece, a dead engine's too.
                    if self.dead:
                        raise _died()
                    yield Answer(int(piece["error"].get("code") or 500), piece)
                    return
                piece["model"] = public_model
                yield Answer(200, piece)

    def _parse(self, endpoint: int, raw: bytes, model: str | None, *, stream: bool) -> Any:
        body = json.loads(raw)
        if not isinstance(body, dict):
            raise TypeError("The body must be a JSON object.")
        body |= {"model": model or self._base_id, "stream": stream}
        if not stream:
            body.pop("stream_options", None)
        kind = ChatCompletionRequest if endpoint == engine_pb2.ENDPOINT_CHAT_COMPLETIONS else CompletionRequest
        return kind.model_validate(body)

    async def _handle(self, endpoint: int, request: Any) -> Any:
        if endpoint == engine_pb2.ENDPOINT_CHAT_COMPLETIONS:
            return await self._chat.create_chat_completion(request)
        return await self._completion.create_completion(request)

    def _refused(self, cause: Exception | ErrorResponse, model: str | None, public_model: str) -> Answer:
        if isinstance(cause, ErrorResponse):
            response = cause
        elif isinstance(cause, ValidationError):
            first = cause.errors()[0]
            field = ".".join(map(str, first["loc"]))
            response = create_error_response(f"{field}: {first['msg']}" if field else first["msg"], param=field or None)
        else:
            response = create_error_response(cause)
            if response.error.code == HTTPStatus.INTERNAL_SERVER_ERROR:
                raise cause  # no refusal but a defect: the log's, and not for whoever asked
        body = response.model_dump(mode="json")
        if model is not None:
            body["error"]["message"] = body["error"]["message"].replace(model, public_model)
        return Answer(int(response.error.code), body)


def _died() -> Unavailable:
    return Unavailable(DIED, reason="ENGINE_RESTARTING", retry_after_seconds=RETRY_SECONDS)
