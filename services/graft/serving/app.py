"""A Ray Serve application of one base model: its deployment answers `graft.internal.v1.Engine` behind Serve's proxy.

A replica's constructor returns at once and the engine starts in the background, so that the door answers early:
requests get Unavailable with a retry hint, and Residency says `ready: false`. Every error is told inside the response,
because an exception that leaves a replica reaches the client with Ray's trace and addresses in it.
"""

import asyncio
import importlib.util
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
from google.protobuf import timestamp_pb2
from ray import serve

from graft.domain.errors import GraftError, Internal, InvalidArgument, Unavailable
from graft.domain.resources import BaseModel
from graft.internal.engine_client import APPLICATION, RETRY_SECONDS, STARTING
from graft.internal.status import to_status
from graft.internal.token import read_token, token_file
from graft.internal.v1 import engine_pb2
from graft.placement_settings import ReplicaPoolSettings
from graft.process_memory import tree_bytes
from graft.serving.applications import Applications
from graft.serving.guard import guarded, guarded_stream
from graft.serving.keeper import Keeper
from graft.serving.processes import prepare_environment, start_fork_server
from graft.serving.pulling import ProvingPuller, Registry
from graft.serving.residency import Ref, Residency
from graft.settings import ServingSettings, Settings
from graft.storage import Storage, fetch_base_model, open_storage

if TYPE_CHECKING:
    from graft.serving.engine import Engine

DEPLOYMENT = "engine"
MAX_ONGOING_REQUESTS = 1024
"""vLLM queues what it cannot batch, in order; Serve's default of 5 would starve its batches."""
MAX_QUEUED_REQUESTS = 1024
"""Beyond it Serve answers RESOURCE_EXHAUSTED: refused by limit, not by memory."""

HELD_SECONDS = 1.5
"""A replica tells what it holds in milliseconds. One that is not heard of by then, as on a host whose link is cut, is
left out: readiness is asked within two seconds, and one lost host must not take the others with it."""
WEIGH_SECONDS = 10.0
"""Residency is asked by probes every few seconds; to sum a process tree's memory takes tens of milliseconds."""

QUIET = {"enable_access_log": False, "log_level": "WARNING"}
"""Serve's own logs: a line a call is the gateway's to write, with the request's id and who asked."""

_log = structlog.get_logger("graft.serving")


class EngineReplica:
    """One replica: an engine, what it holds, and the RPCs of `Engine` as methods of the same names."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: ServingSettings, base: BaseModel, tracking_uri: str, cache: Path, storage: Storage
    ) -> None:
        self._settings = settings
        self.token = read_token(settings.token_file)
        self._pool = settings.pool(base.id)
        base = replace(base, path=str(await asyncio.to_thread(fetch_base_model, storage, base.path, base.digest)))
        self._base = base
        self._tracking_uri = tracking_uri
        self._cache = cache
        context = serve.get_replica_context()
        self._replica = context.replica_tag
        self._handle = serve.get_deployment_handle(context.deployment, context.app_name)
        torch = importlib.util.find_spec("torch")
        if torch is None or torch.origin is None:
            raise RuntimeError("torch is not installed: install graft[serving-cpu] or graft[serving-gpu].")
        prepare_environment(Path(torch.origin).parent, threads=len(os.sched_getaffinity(0)))
        # Serve runs a constructor in the replica's event loop, whose thread lives as long as the process does.
        start_fork_server()
        self._keeper: Keeper[Engine] = Keeper(self._build)
        self._puller = ProvingPuller(base, settings.max_lora_rank, self._open_registry, storage, cache)
        capacity = max(settings.max_cpu_loras, settings.max_loras)
        self._residency = Residency(capacity, self._keeper, self._puller)
        self._keeping = asyncio.create_task(self._keeper.run(self._residency))
        self._applications = (
            Applications(base.id, settings, lambda other: bind(settings, other, tracking_uri, cache, storage))
            if context.app_name == APPLICATION
            else None
        )
        """Those beside this one, which the first application answers for."""
        self._warming: asyncio.Task[None] | None = None
        self._weighed = float("-inf")
        self._held_bytes = 0

    async def _build(self) -> "Engine":
        engine = await asyncio.to_thread(self._build_blocking)
        if self._warming is None:
            # Not earlier: the registry's client takes seconds to import, on cores that the engine's start needs.
            self._warming = asyncio.create_task(self._warm())
        return engine

    async def _warm(self) -> None:
        try:
            await asyncio.to_thread(self._puller.warm)
        except GraftError as error:
            _log.warning("the registry does not answer yet; the first pull tries again", error=error.message)

    def _build_blocking(self) -> "Engine":
        # Imported here: it takes 20 s, during which the door already answers.
        from graft.serving.engine import Engine

        return Engine.build(self._settings, self._base)

    def _open_registry(self) -> Registry:
        from graft.registry.mlflow_registry import Registry as MlflowRegistry

        return MlflowRegistry(self._tracking_uri, self._cache)

    @guarded
    async def Generate(self, request: engine_pb2.GenerateRequest) -> engine_pb2.GenerateResponse:
        """Answers an OpenAI body at once."""
        try:
            _check_endpoint(request)
            async with self._adapter(request) as model:
                answer = await self._keeper.engine().generate(
                    request.endpoint, request.body, model, request.public_model
                )
        # The boundary: whatever is raised is told as a domain error, a defect without its trace.
        except Exception as error:  # noqa: BLE001
            return engine_pb2.GenerateResponse(error=to_status(_known(error, request.request_id)))
        return engine_pb2.GenerateResponse(http_status=answer.http_status, body=answer.json())

    @guarded_stream
    async def Stream(self, request: engine_pb2.StreamRequest) -> AsyncGenerator[engine_pb2.StreamResponse, None]:
        """Answers an OpenAI body piece by piece."""
        inner = request.request
        try:
            _check_endpoint(inner)
            async with self._adapter(inner) as model:
                pieces = self._keeper.engine().stream(inner.endpoint, inner.body, model, inner.public_model)
                # Closed before the adapter is let go: the engine must not lose one that it still computes with.
                async with aclosing(pieces):
                    async for piece in pieces:
                        yield engine_pb2.StreamResponse(http_status=piece.http_status, data=piece.json())
        except Exception as error:  # noqa: BLE001  # the boundary, as above
            yield engine_pb2.StreamResponse(error=to_status(_known(error, inner.request_id)))

    @guarded
    async def Load(self, request: engine_pb2.LoadRequest) -> engine_pb2.LoadResponse:
        """Pulls, proves and loads an adapter version on every replica."""
        started = time.perf_counter()
        response = engine_pb2.LoadResponse()
        for answer in await self._everywhere("load_here", request.SerializeToString()):
            response.MergeFrom(engine_pb2.LoadResponse.FromString(answer))
        response.load_seconds = time.perf_counter() - started
        return response

    @guarded
    async def Unload(self, request: engine_pb2.UnloadRequest) -> engine_pb2.UnloadResponse:
        """Takes an adapter version out of every replica."""
        response = engine_pb2.UnloadResponse()
        for answer in await self._everywhere("unload_here", request.digest):
            response.MergeFrom(engine_pb2.UnloadResponse.FromString(answer))
        return response

    @guarded
    async def Residency(self, _request: engine_pb2.ResidencyRequest) -> engine_pb2.ResidencyResponse:
        """Tells what every replica holds that answers; this one alone when another does not."""
        response = engine_pb2.ResidencyResponse()
        for answer in await self._held():
            response.MergeFrom(engine_pb2.ResidencyResponse.FromString(answer))
        return response

    @guarded
    async def Deploy(self, request: engine_pb2.DeployRequest) -> engine_pb2.DeployResponse:
        """Starts an application for another base model."""
        try:
            await self._others().deploy(_model(request.model, self._settings))
        except Exception as error:  # noqa: BLE001  # the boundary, as above
            return engine_pb2.DeployResponse(error=to_status(_known(error, request.model.id)))
        return engine_pb2.DeployResponse()

    @guarded
    async def Undeploy(self, request: engine_pb2.UndeployRequest) -> engine_pb2.UndeployResponse:
        """Ends the application of another base model."""
        try:
            await self._others().undeploy(request.base_model)
        except Exception as error:  # noqa: BLE001  # the boundary, as above
            return engine_pb2.UndeployResponse(error=to_status(_known(error, request.base_model)))
        return engine_pb2.UndeployResponse()

    @guarded
    async def ListApplications(
        self, _request: engine_pb2.ListApplicationsRequest
    ) -> engine_pb2.ListApplicationsResponse:
        """Tells every application."""
        try:
            return engine_pb2.ListApplicationsResponse(applications=await self._others().all())
        except Exception as error:  # noqa: BLE001  # the boundary, as above
            return engine_pb2.ListApplicationsResponse(error=to_status(_known(error, "applications")))

    async def load_here(self, request: bytes) -> bytes:
        """`Load` on this replica; messages travel between replicas as bytes."""
        asked = engine_pb2.LoadRequest.FromString(request)
        ref = asked.adapter
        try:
            self._check_base(asked.base_model)
            self._keeper.engine()
            await self._residency.load(_ref(ref))
        except Exception as error:  # noqa: BLE001  # the boundary, as above
            return engine_pb2.LoadResponse(error=to_status(_known(error, ref.model))).SerializeToString()
        return engine_pb2.LoadResponse(replicas=[self._state()]).SerializeToString()

    async def unload_here(self, digest: str) -> bytes:
        """`Unload` on this replica."""
        try:
            await self._residency.unload(digest)
        except Exception as error:  # noqa: BLE001  # the boundary, as above
            return engine_pb2.UnloadResponse(error=to_status(_known(error, digest))).SerializeToString()
        return engine_pb2.UnloadResponse(replicas=[self._state()]).SerializeToString()

    async def held_here(self) -> bytes:
        """`Residency` on this replica."""
        state = self._state()
        state.memory_bytes = await self._memory_bytes()
        return engine_pb2.ResidencyResponse(replicas=[state]).SerializeToString()

    async def _memory_bytes(self) -> int:
        if time.monotonic() - self._weighed >= WEIGH_SECONDS:
            self._weighed = time.monotonic()
            self._held_bytes = await asyncio.to_thread(tree_bytes, os.getpid())
        return self._held_bytes

    async def check_health(self) -> None:
        """Serve replaces the replica when the keeper itself has ended, which is a defect."""
        if self._keeping.done():
            raise RuntimeError("The engine's keeper has ended.")

    async def __del__(self) -> None:
        """Serve awaits it before it ends the replica."""
        self._keeping.cancel()
        await self._keeper.close()

    async def _everywhere(self, method: str, *arguments: object) -> list[bytes]:
        if self._pool.num_replicas == 1:
            return [await getattr(self, method)(*arguments)]
        results: list[bytes] = await self._handle.broadcast(method, *arguments).results_async()
        return results

    async def _held(self) -> list[bytes]:
        if self._pool.num_replicas == 1:
            return [await self.held_here()]
        asked = self._handle.broadcast("held_here")
        try:
            answers = await asked.results_async(timeout_s=HELD_SECONDS, return_exceptions=True)
        except TimeoutError:
            return [await self.held_here()]
        return [answer for answer in answers if isinstance(answer, bytes)] or [await self.held_here()]

    def _check_base(self, base: str) -> None:
        """Serve's proxy hands every request to the only application that there is, whichever it names."""
        if base and base != self._base.id:
            raise Unavailable(STARTING, reason="ENGINE_STARTING", retry_after_seconds=RETRY_SECONDS)

    def _others(self) -> Applications:
        if self._applications is None:  # as above: the first is not there yet, and this one was asked in its place
            raise Unavailable(STARTING, reason="ENGINE_STARTING", retry_after_seconds=RETRY_SECONDS)
        return self._applications

    @asynccontextmanager
    async def _adapter(self, request: engine_pb2.GenerateRequest) -> AsyncIterator[str | None]:
        self._check_base(request.base_model)
        self._keeper.engine()
        if not request.HasField("adapter"):
            yield None
            return
        async with self._residency.use(_ref(request.adapter)) as name:
            yield name

    def _state(self) -> engine_pb2.Replica:
        replica = engine_pb2.Replica(
            replica=self._replica,
            base_model=self._base.id,
            base_model_digest=self._base.digest,
            capacity=self._residency.capacity,
            ready=self._keeper.ready,
            engine_restarts=self._keeper.restarts,
            max_lora_rank=self._settings.max_lora_rank,
            dtype=self._keeper.engine().dtype if self._keeper.ready else "",
            start_error=self._keeper.start_error,
        )
        for held in self._residency.held():
            used = timestamp_pb2.Timestamp()
            used.FromDatetime(held.last_use_time)
            replica.adapters.add(
                model=held.model,
                digest=held.digest,
                in_engine=held.in_engine,
                active_requests=held.active_requests,
                last_use_time=used,
            )
        return replica


def _check_endpoint(request: engine_pb2.GenerateRequest) -> None:
    if request.endpoint not in (engine_pb2.ENDPOINT_CHAT_COMPLETIONS, engine_pb2.ENDPOINT_COMPLETIONS):
        raise InvalidArgument("endpoint is not set.", reason="INVALID_ENDPOINT")


def _ref(adapter: engine_pb2.AdapterRef) -> Ref:
    if not adapter.digest or not (adapter.path or adapter.registered_model):
        raise InvalidArgument(
            f"Adapter {adapter.model!r} needs a digest, and a path or a registered model.", reason="INVALID_ADAPTER"
        )
    return Ref(adapter.model, adapter.digest, adapter.registered_model, adapter.version, adapter.path)


def _known(error: Exception, request_id: str) -> GraftError:
    if isinstance(error, GraftError) and not isinstance(error, Internal):
        return error
    _log.error("request failed unexpectedly", request_id=request_id, exc_info=error)
    return Internal(
        f"The inference service failed to answer. Its log has the reason under {request_id!r}.",
        reason="INTERNAL",
        metadata={"request_id": request_id},
    )


def _model(served: engine_pb2.ServedModel, settings: ServingSettings) -> BaseModel:
    """What an engine needs of a base model; what people are told of it stays in the catalogue."""
    return BaseModel(
        id=served.id,
        path=served.path,
        digest=served.digest,
        parameter_count=served.parameter_count,
        size_bytes=served.size_bytes,
        context_tokens=served.context_tokens,
        license="",
        source="",
        target_modules=tuple(served.target_modules),
        max_lora_rank=settings.max_lora_rank,
    )


def actor_options(pool: ReplicaPoolSettings) -> dict[str, Any]:
    """What Ray reserves for a replica, and where."""
    options = {"num_cpus": pool.cpus, "num_gpus": pool.gpus, "resources": dict(pool.resources)}
    return options | ({"label_selector": dict(pool.label_selector)} if pool.label_selector else {})


def build_app(settings: Settings, base: BaseModel) -> Any:
    """The application, for `serve.run` under the name `engine_client.application_name`."""
    serving = settings.serving.model_copy(update={"token_file": token_file(settings)})
    return bind(serving, base, settings.tracking_uri, settings.home.cache, open_storage(settings))


def bind(
    settings: ServingSettings,
    base: BaseModel,
    tracking_uri: str,
    cache: Path,
    storage: Storage,
    replica: type = EngineReplica,
) -> Any:
    """The application of one base model, on the nodes of its pool. `replica`: another class that takes the same."""
    pool = settings.pool(base.id)
    deployment = serve.deployment(
        replica,
        name=DEPLOYMENT,
        num_replicas=pool.num_replicas,
        max_replicas_per_node=settings.max_replicas_per_node or None,
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        max_queued_requests=MAX_QUEUED_REQUESTS,
        ray_actor_options=actor_options(pool),
        graceful_shutdown_timeout_s=10,
        logging_config=QUIET,
    )
    return deployment.bind(settings, base, tracking_uri, cache, storage)
