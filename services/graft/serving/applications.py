"""Applications beside the first: other base models, each with replicas and an engine of its own.

The first application's replica answers for all of them, since it is the one that is always there. Owns their names, the
checks of nodes and memory and what Ray Serve is told; does not know which are wished for (the orchestrator's part),
nor engines.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import psutil
import structlog
from ray import serve
from ray.serve.schema import ApplicationStatus

from graft.domain.errors import FailedPrecondition, InvalidArgument, ResourceExhausted, Unavailable
from graft.domain.placement import Node, amounts, count, suits, total
from graft.domain.resources import BaseModel
from graft.internal.engine_client import APPLICATION, application_name
from graft.internal.v1 import engine_pb2
from graft.nodes import nodes
from graft.placement_settings import ReplicaPoolSettings
from graft.settings import ServingSettings

GIB = 1024**3
PROCESSES_BYTES = 3 * GIB // 2
"""Replica, fork server and engine core without weights and KV cache, PyTorch and vLLM imported in each: 1.3 GiB
measured (PSS)."""
WEIGHTS_FACTOR = 2
"""Files are of 16 bits; an engine on a CPU without bfloat16 arithmetic holds 32."""

_log = structlog.get_logger("graft.serving")
_STATES = {
    ApplicationStatus.RUNNING: engine_pb2.Application.STATE_RUNNING,
    ApplicationStatus.DEPLOY_FAILED: engine_pb2.Application.STATE_FAILED,
    ApplicationStatus.DELETING: engine_pb2.Application.STATE_STOPPING,
}
"""All others are steps to RUNNING, or back to it."""


def check_nodes(base: str, pool: ReplicaPoolSettings, there: Sequence[Node]) -> None:
    """Raises FailedPrecondition when the nodes could not hold the replicas even if nothing else ran there.

    Serve would wait for such nodes for ever, and without a word.
    """
    asked = pool.demand
    fitting = count(there, asked) if asked.resources else pool.num_replicas * any(suits(node, asked) for node in there)
    if fitting < pool.num_replicas:
        raise FailedPrecondition(
            f"{pool.num_replicas} x {asked} is declared for replicas of {base}. The inference service's nodes have "
            f"{amounts(total(there, asked))}{asked.where}, room for {fitting}. Add nodes, or change serving.pools.",
            reason="NO_NODES",
            metadata={"replicas": str(pool.num_replicas), "fitting": str(fitting)},
        )


def check_memory(model: BaseModel, kv_cache_gib: int, available_bytes: int) -> None:
    """Raises ResourceExhausted with the numbers when an engine for `model` would not fit into what is available.

    An engine that does not fit is not refused by the kernel: it ends some process, perhaps another engine.
    """
    needed = WEIGHTS_FACTOR * model.size_bytes + kv_cache_gib * GIB + PROCESSES_BYTES
    if needed <= available_bytes:
        return
    raise ResourceExhausted(
        f"Serving {model.id} takes {needed / GIB:.1f} GiB ({WEIGHTS_FACTOR} x {model.size_bytes / GIB:.1f} of weights, "
        f"{kv_cache_gib} of KV cache, {PROCESSES_BYTES / GIB} of processes), and {available_bytes / GIB:.1f} GiB "
        "are available. Undeploy another model (`graft models undeploy`), or set GRAFT_SERVING_KV_CACHE_GIB lower.",
        reason="NOT_ENOUGH_MEMORY",
        metadata={"needed_bytes": str(needed), "available_bytes": str(available_bytes)},
    )


class Applications:
    """Those of this cluster. `build` makes the Serve application of a base model."""

    def __init__(self, first: str, settings: ServingSettings, build: Callable[[BaseModel], Any]) -> None:
        self._first = first
        self._settings = settings
        self._build = build
        self._lock = asyncio.Lock()
        """One change at a time, and none for longer than Serve takes to hear of it: one without room would keep all
        others waiting. Memory that an engine has not taken yet is its asker's to wait for."""
        self._tasks: set[asyncio.Task[None]] = set()

    async def deploy(self, model: BaseModel) -> None:
        """Starts an application, unless it is there. `all` tells when its replicas run, or that they cannot.

        Raises InvalidArgument for the first base model, ResourceExhausted when memory does not suffice,
        FailedPrecondition when no nodes could hold it or Ray Serve does not take it, and Unavailable while the one
        before it is ending.
        """
        self._check_other(model.id)
        # Shielded: a caller that goes away must not free the lock while Serve is at work in its thread.
        await asyncio.shield(self._kept(self._deploy(model)))

    async def undeploy(self, base: str) -> None:
        """Ends an application and returns when its processes have; unknown ones are already gone.

        Raises InvalidArgument for the first base model, Unavailable when Ray Serve takes more than a minute.
        """
        self._check_other(base)
        await asyncio.shield(self._kept(self._undeploy(base)))

    async def _deploy(self, model: BaseModel) -> None:
        async with self._lock:
            states = {application.base_model: application.state for application in await self.all()}
            if states.get(model.id) == engine_pb2.Application.STATE_STOPPING:
                raise _still_ending(model.id)  # it is none that could be counted on
            if model.id in states:
                return
            pool = self._settings.pool(model.id)
            check_nodes(model.id, pool, await asyncio.to_thread(nodes))
            # Elsewhere, or on a GPU, only the engine itself sees how much there is.
            if not pool.gpus and not pool.label_selector:
                check_memory(model, self._settings.kv_cache_gib, psutil.virtual_memory().available)
            await asyncio.to_thread(self._run, model)

    async def _undeploy(self, base: str) -> None:
        async with self._lock:  # a start that is under way would be missed
            there = base in {application.base_model for application in await self.all()}
        if not there:
            return
        try:
            await asyncio.to_thread(serve.delete, application_name(base, self._first))
        except TimeoutError:
            raise _still_ending(base) from None

    async def all(self) -> list[engine_pb2.Application]:
        """Every application of Graft's, the first one too: on a cluster that others run, Serve has theirs as well."""
        status = await asyncio.to_thread(serve.status)
        prefix = application_name("", self._first)
        return [
            engine_pb2.Application(
                base_model=self._first if name == APPLICATION else name.removeprefix(prefix),
                state=_STATES.get(application.status, engine_pb2.Application.STATE_STARTING),
            )
            for name, application in status.applications.items()
            if name == APPLICATION or name.startswith(prefix)
        ]

    def _kept(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._tasks.add(task)  # asyncio itself holds tasks weakly
        task.add_done_callback(self._tasks.discard)
        return task

    def _check_other(self, base: str) -> None:
        if not base or base == self._first:
            raise InvalidArgument(
                f"{base or 'An empty name'} is not a base model beside the first.", reason="INVALID_DEPLOYMENT"
            )

    def _run(self, model: BaseModel) -> None:
        name = application_name(model.id, self._first)
        try:
            # Without a route Serve's proxy would not know the application at all, not even over gRPC.
            target = serve.RunTarget(self._build(model), name=name, route_prefix=f"/{name}")
            serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        # Whatever Serve raises may hold traces and addresses: its log has them.
        except Exception as error:
            _log.error("application did not start", application=name, exc_info=error)
            serve.delete(name)
            raise FailedPrecondition(
                f"Ray Serve could not start an application for {model.id}; the inference service's log says why.",
                reason="APPLICATION_FAILED",
            ) from error


def _still_ending(base: str) -> Unavailable:
    return Unavailable(
        f"Ray Serve has not ended the application of {base} yet, and goes on. Ask again in a minute.",
        reason="APPLICATION_ENDING",
    )
