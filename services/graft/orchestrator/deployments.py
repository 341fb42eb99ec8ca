"""Carries out which base models are served beside the first: what the store wishes, made so on the inference service.

A full model is first fetched from the registry and becomes a base model of the catalogue. An engine is started once: if
it fails or is not ready in time, the deployment says why and nothing is tried again until somebody asks. After a
restart of the inference service, what was there is started again, and waits for nodes that come back later than the
first application. None waits long for another, whatever becomes of that. Does not know Ray: the service's first
application answers for all.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog

from graft.domain.deployments import Deployment, DeploymentState, full_model_source
from graft.domain.errors import Aborted, FailedPrecondition, GraftError, Internal, NotFound, Unavailable
from graft.domain.jobs import JobError
from graft.domain.names import parse_model, registered_model
from graft.domain.resources import BaseModel
from graft.internal.v1 import engine_pb2
from graft.orchestrator.evaluating import (
    HALF_PARITY_NATS,
    PARITY_NATS,
    engine_context_tokens,
    fits,
    read_trained,
    score,
)
from graft.orchestrator.patience import answered
from graft.orchestrator.ports import ApplicationsPort, ModelSource
from graft.orchestrator.threads import call, to_the_end
from graft.registry.digest import MODEL_CONFIG
from graft.registry.full_models import adopt
from graft.settings import Settings
from graft.storage import open_storage, share_base_model
from graft.store.protocol import Store

log = structlog.get_logger()

POLL_SECONDS = 1.0
"""An engine takes ten seconds and more to start: a second more is not noticed."""
TURN_SECONDS = 120.0
"""How long others wait for an engine to take its memory: 84 s measured for a cold one on two cores."""
START_SECONDS = 1800.0
"""How long an engine may take: 140 GB of weights, read at 100 MB/s, take 23 minutes."""
BACK_SECONDS = 600.0
"""How long what was READY may be refused for want of nodes or memory before it is FAILED: as long as a job waits for a
host that it has lost."""
FETCH_SECONDS = 60.0
"""How long until a full model that this host lacks, and that is served, is tried to be fetched again."""
PASSES = frozenset({"NO_NODES", "NOT_ENOUGH_MEMORY"})
"""Reasons of refusals that may pass: nodes of a cluster that comes back join one by one, and those that ended may still
be freeing their memory."""


class Deployments:
    """One way, store to inference service; how far each is, back into the store."""

    def __init__(
        self,
        store: Store,
        engine: ApplicationsPort,
        registry: ModelSource,
        refresh_catalogue: Callable[[], Awaitable[None]],
        settings: Settings,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        self._store = store
        self._engine = engine
        self._registry = registry
        self._refresh_catalogue = refresh_catalogue
        self._settings = settings
        self._poll_seconds = poll_seconds
        self._starting: dict[str, asyncio.Task[None]] = {}
        self._stopping: dict[str, asyncio.Task[None]] = {}
        self._back_until: dict[str, float] = {}
        """Of those that were READY and are started again: until when a refusal may pass."""
        self._fetch_due: dict[str, float] = {}
        """Of full models that are served and could not be fetched: when it is tried again."""
        self._turn = asyncio.Lock()
        """Engines start one after the other: memory that one has not taken yet would be counted for the next."""
        self._away = False

    async def run(self) -> None:
        """Until cancelled. Engines that run go on."""
        try:
            while True:
                try:
                    await self.reconcile()
                    self._away = False
                except Exception as error:  # noqa: BLE001 - store or inference service are away: again at the next turn
                    if not self._away:
                        self._away = True
                        log.warning("deployments_wait", error=str(error), kind=type(error).__name__)
                await asyncio.sleep(self._poll_seconds)
        finally:
            tasks = {*self._starting.values(), *self._stopping.values()}
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)

    async def reconcile(self) -> None:
        """One turn. Raises what the store or the inference service raise; starts and ends are tasks that outlive it."""
        # Before the rows are read: one whose start ends meanwhile is READY by now, and its row here still STARTING.
        busy = {base for base, task in self._starting.items() if not task.done()}
        ending = {base for base, task in self._stopping.items() if not task.done()}
        wishes = await self._store.every_deployment()
        if not wishes:
            return
        there = {application.base_model for application in await self._engine.applications()}
        for wish in wishes:
            if wish.base_model in ending:
                continue
            if wish.state is DeploymentState.STOPPING:
                start = self._starting.pop(wish.base_model, None)
                self._stopping[wish.base_model] = asyncio.create_task(self._stop(wish, start))
            elif wish.base_model in busy:
                continue
            elif wish.state is DeploymentState.STARTING or (
                wish.state is DeploymentState.READY and wish.base_model not in there
            ):
                self._starting[wish.base_model] = asyncio.create_task(self._start(wish))
            elif wish.is_version and wish.state is DeploymentState.READY and await self._is_missing(wish):
                self._starting[wish.base_model] = asyncio.create_task(self._fetch_again(wish))

    async def _stop(self, wish: Deployment, task: "asyncio.Task[None] | None") -> None:
        """Until it is gone; what keeps it is told in the log, and the next turn tries again."""
        try:
            if task is not None:
                task.cancel()
                await asyncio.wait({task})
            self._back_until.pop(wish.base_model, None)
            await self._engine.undeploy(wish.base_model)
            await to_the_end(self._store.remove_deployment(wish.base_model))
            log.info("undeployed", base_model=wish.base_model)
        except Exception as error:  # noqa: BLE001 - whatever it is, the others go on
            log.warning("undeploy_waits", base_model=wish.base_model, error=str(error), kind=type(error).__name__)

    async def _start(self, wish: Deployment) -> None:
        """To READY or FAILED; what is only away for a moment leaves it STARTING, for the next turn."""
        base = wish.base_model
        try:
            if wish.state is DeploymentState.READY:
                self._back_until[base] = time.monotonic() + BACK_SECONDS
            if not await self._move(base, DeploymentState.STARTING):
                return  # undeployed meanwhile, or it has failed in the hands of another orchestrator
            model = await self._model(wish)
            await call(share_base_model, open_storage(self._settings), model.path, model.digest)
            async with self._turn:
                await answered(self._engine.deploy(model))
                started = time.monotonic()
                replicas = await self._ready(base, TURN_SECONDS)
            replicas = replicas or await self._ready(base, started + START_SECONDS - time.monotonic())
            if not replicas:
                raise FailedPrecondition(
                    f"The engine of {base} was not ready after {START_SECONDS / 60:.0f} minutes; the inference "
                    "service's log has the rest. Deploy it again once the cause is gone.",
                    reason="ENGINE_START_TIMEOUT",
                )
            await self._prove(model, replicas)
            if not await self._move(base, DeploymentState.READY):
                await self._engine.undeploy(base)  # as above: nobody counts on it
                return
            self._back_until.pop(base, None)
            log.info("deployed", base_model=base, source=wish.source)
        except (Unavailable, Aborted) as error:  # the latter: another orchestrator leads now, and goes on with it
            log.warning("deployment_waits", base_model=base, error=error.message)
        except Exception as error:  # noqa: BLE001 - whatever it is, the deployment tells it and the others go on
            if self._may_pass(base, error):
                log.warning("deployment_waits", base_model=base, error=str(error))
            else:
                await self._fail(base, error)

    async def _fetch_again(self, wish: Deployment) -> None:
        """A full model that is served, for the catalogue of this host, where another's orchestrator has led before."""
        try:
            await self._model(wish)
            log.info("full_model_fetched", base_model=wish.base_model)
        except Exception as error:  # noqa: BLE001 - its engine answers all the same
            self._fetch_due[wish.base_model] = time.monotonic() + FETCH_SECONDS
            log.warning("full_model_missing", base_model=wish.base_model, error=str(error), kind=type(error).__name__)

    def _may_pass(self, base: str, error: Exception) -> bool:
        refused = isinstance(error, GraftError) and error.reason in PASSES
        return refused and time.monotonic() < self._back_until.get(base, 0.0)

    async def _fail(self, base: str, error: Exception) -> None:
        if not isinstance(error, GraftError):
            log.error("deployment_failed", base_model=base, exc_info=error)
            error = Internal(
                f"A defect in Graft ended the deployment: {type(error).__name__}. The orchestrator's log has the rest.",
                reason="INTERNAL",
            )
        self._back_until.pop(base, None)
        log.warning("deployment_failed", base_model=base, reason=error.reason, error=error.message)
        try:
            await self._engine.undeploy(base)  # it must not hold memory, nor start over and over
        except GraftError as trouble:
            log.warning("not_undeployed", base_model=base, error=trouble.message)
        await self._move(base, DeploymentState.FAILED, JobError(error.code, error.reason, error.message))

    async def _move(self, base: str, state: DeploymentState, error: JobError | None = None) -> bool:
        return await to_the_end(self._store.move_deployment(base, state, error))

    async def _model(self, wish: Deployment) -> BaseModel:
        """The base model to serve; a full model joins the catalogue first."""
        if wish.is_version and not await self._is_there(wish):
            name = parse_model(wish.source)
            version = await self._store.resolve_version(
                wish.project, name.base, str(name.adapter), version=name.version, alias=None
            )
            trained_from = await self._store.get_base_model(name.base)
            pulled = await call(
                self._registry.pull_model,
                registered_model(wish.project, version.base_model, version.adapter),
                version.version,
                version.digest,
            )
            await call(adopt, self._settings, wish.base_model, wish.project, wish.source, trained_from.license, pulled)
            await self._refresh_catalogue()
        return await self._store.get_base_model(wish.base_model)

    async def _is_missing(self, wish: Deployment) -> bool:
        """Whether it is to be fetched again."""
        return time.monotonic() >= self._fetch_due.get(wish.base_model, 0.0) and not await self._is_there(wish)

    async def _is_there(self, wish: Deployment) -> bool:
        """Whether the catalogue has the full model, from an earlier deployment or before a restart, and its folder."""
        try:
            found = await self._store.get_base_model(wish.base_model)
        except NotFound:
            return False
        same = found.source == full_model_source(wish.project, wish.source)
        return same and await call((Path(found.path) / MODEL_CONFIG).is_file)

    async def _ready(self, base: str, seconds: float) -> list[engine_pb2.Replica]:
        """Its application's engines once all are ready; none when they are not after `seconds`.

        Raises FailedPrecondition when one does not start.
        """
        give_up = time.monotonic() + seconds
        while True:
            states = {one.base_model: one.state for one in await answered(self._engine.applications())}
            if states.get(base) in (None, engine_pb2.Application.STATE_FAILED):
                raise FailedPrecondition(
                    f"Ray Serve gave up the application of {base}; the inference service's log says why.",
                    reason="APPLICATION_FAILED",
                )
            try:
                replicas = list((await answered(self._engine.of(base).residency())).replicas)
            except Unavailable:  # its door opens after a moment
                replicas = []
            if faults := [replica.start_error for replica in replicas if replica.start_error]:
                raise FailedPrecondition(
                    f"The engine of {base} does not start: {faults[0]} The inference service's log has the rest.",
                    reason="ENGINE_FAILED_TO_START",
                )
            if replicas and all(replica.ready for replica in replicas):
                return replicas
            if time.monotonic() > give_up:
                return []
            await asyncio.sleep(self._poll_seconds)

    async def _prove(self, model: BaseModel, replicas: list[engine_pb2.Replica]) -> None:
        """Parity with the probes that the trainer kept in the model's folder; a model without them has none to prove.

        Raises FailedPrecondition PARITY_FAILED.
        """
        file = Path(model.path) / "graft.json"
        if not await call(_has_probes, file):
            return
        trained = await call(read_trained, file)
        dtypes = {trained.dtype, *(replica.dtype for replica in replicas)}
        limit = PARITY_NATS if dtypes <= {"float32"} else HALF_PARITY_NATS
        context_tokens = engine_context_tokens(model, self._settings.serving)
        fitting = [probe for probe in trained.probes if fits(probe, context_tokens)]
        engine = self._engine.of(model.id)
        difference = 0.0
        for probe in fitting:
            mean_logprob = await score(engine, engine_pb2.AdapterRef(model=model.id), probe)
            difference = max(difference, abs(mean_logprob - probe.mean_logprob))
        log.info("parity", base_model=model.id, probes=len(fitting), max_abs_difference=round(difference, 5))
        if not fitting or difference > limit:
            raise FailedPrecondition(
                f"The engine does not compute what was trained: over {len(fitting)} of the {len(trained.probes)} "
                f"probes of {model.id} its log-probabilities differ by up to {difference:.4f} nats a token from the "
                f"trainer's, and {limit} is allowed.",
                reason="PARITY_FAILED",
                metadata={"max_abs_difference": f"{difference:.6f}"},
            )


def _has_probes(file: Path) -> bool:
    return file.is_file() and "probes" in json.loads(file.read_bytes())
