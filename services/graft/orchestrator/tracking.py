"""One attempt's MLflow run, written beside training and never in its way.

Metrics wait in memory and go out once a second; while MLflow is down they stay and training goes on. What a killed
orchestrator had not yet sent is lost to MLflow (the store's events have it).
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

import structlog

from graft.domain.errors import Unavailable
from graft.domain.jobs import Job
from graft.orchestrator.ports import Limits, RegistryPort
from graft.orchestrator.threads import call

log = structlog.get_logger()


class Tracker:
    """Owns the writing of one MLflow run. `finish` ends it; `close` drops it."""

    def __init__(
        self,
        registry: RegistryPort,
        limits: Limits,
        job: Job,
        params: dict[str, str],
        tags: dict[str, str],
        on_run: Callable[[str], Awaitable[None]],
        on_trouble: Callable[[str], Awaitable[None]],
    ) -> None:
        self._registry = registry
        self._limits = limits
        self._job = job
        self._params = params
        self._tags = tags
        self._on_run = on_run
        self._on_trouble = on_trouble
        self._metrics: deque[tuple[dict[str, float], int]] = deque()
        self._status: str | None = None
        self._wake = asyncio.Event()
        self._run_id: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._told = False
        self._task = asyncio.create_task(self._work())

    @property
    def attempt(self) -> int:
        """Attempt whose run this is."""
        return self._job.attempt

    @property
    def task(self) -> asyncio.Task[None]:
        """Done when nothing is left to write."""
        return self._task

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Takes metrics of one step."""
        self._metrics.append((metrics, step))

    def finish(self, status: str) -> None:
        """Sends what is left and ends the run: FINISHED, FAILED or KILLED. Returns at once."""
        self._status = self._status or status
        self._wake.set()

    def leave(self) -> None:
        """Sends what is left without ending the run, for the process stops and another will go on. Returns at once."""
        self._wake.set()

    async def run_id(self) -> str:
        """The MLflow run's id; waits until MLflow has given one. Raises Unavailable when that takes too long."""
        try:
            async with asyncio.timeout(self._limits.unavailable_seconds):
                return await asyncio.shield(self._run_id)
        except TimeoutError:
            raise Unavailable(
                f"MLflow has not answered for {self._limits.unavailable_seconds:.0f} s, so the adapter cannot be "
                "registered. Its files are kept.",
                reason="REGISTRY_UNAVAILABLE",
            ) from None

    def close(self) -> None:
        """Stops writing. The MLflow run stays open for whoever adopts the job."""
        self._task.cancel()
        self._run_id.cancel()

    async def _work(self) -> None:
        while True:
            ending = self._wake.is_set()
            try:
                await self._write(ending)
            except Exception as error:  # noqa: BLE001 - whatever MLflow's client raises, training goes on
                await self._tell(error)
                await asyncio.sleep(self._limits.retry_seconds)
                continue
            if ending:
                return
            try:
                async with asyncio.timeout(self._limits.tracking_batch_seconds):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def _write(self, ending: bool) -> None:
        if not self._run_id.done():
            job = self._job
            run_id = await call(self._registry.start_run, job.project, job.id, job.attempt, self._params, self._tags)
            await self._on_run(run_id)
            self._run_id.set_result(run_id)
        run_id = self._run_id.result()
        if self._metrics:
            await call(self._send, run_id)
        if ending and self._status is not None:
            await call(self._registry.finish_run, run_id, self._status)

    def _send(self, run_id: str) -> None:
        """In a thread: a step leaves the queue once it is written."""
        while self._metrics:
            metrics, step = self._metrics[0]
            self._registry.log_metrics(run_id, metrics, step)
            self._metrics.popleft()

    async def _tell(self, error: Exception) -> None:
        if self._told:
            return
        self._told = True
        log.warning("tracking_unavailable", job=self._job.id, error=str(error), kind=type(error).__name__)
        await self._on_trouble(
            "MLflow does not answer. Training goes on; its metrics are kept and sent when MLflow is back."
        )
