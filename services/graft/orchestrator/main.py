"""The orchestrator's process: connects the loop to the store, Ray, MLflow and the engine, and ends well on SIGTERM.

The store is migrated before, by the gateway or a job of its own; a schema that this process cannot use ends it with a
sentence. Of several, one leads and works; the others stand by (`graft.orchestrator.leading`). Runs are detached: they
outlive this process, and its successor adopts them.
"""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Coroutine
from datetime import timedelta
from typing import Any

from graft import offline

offline.stay()  # before MLflow, which reads its switch when it is imported

import structlog

from graft import settings as graft_settings
from graft.domain.errors import GraftError
from graft.internal.engine_client import EngineClient
from graft.internal.token import engine_token
from graft.orchestrator.catalogue import Catalogue
from graft.orchestrator.deployments import Deployments
from graft.orchestrator.leading import lead
from graft.orchestrator.loop import Orchestrator
from graft.orchestrator.metrics import shown
from graft.orchestrator.ports import Parts
from graft.orchestrator.preparer import TokenizingPreparer, import_tokenizers
from graft.orchestrator.threads import call
from graft.registry.base_models import ensure_base_model
from graft.registry.mlflow_registry import Registry
from graft.settings import Settings
from graft.storage import open_storage
from graft.store.sql import check_schema, open_store
from graft.training.link import RayLink
from graft.training.run import RayRuns

log = structlog.get_logger()


def configure_logging() -> None:
    """One JSON object a line on standard output."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stdout),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(level=logging.WARNING, stream=sys.stdout)


async def serve(settings: Settings, runs: RayRuns) -> None:
    """Until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    token = engine_token(settings)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    store = open_store(settings.store_url)
    engine = EngineClient(settings.engine_address, settings.serving.base_model, token=token)
    registry = Registry(settings.tracking_uri, settings.home.cache)

    async def work(owner: str) -> None:
        led = store.led_by(owner)
        parts = Parts(
            store=led,
            runs=runs,
            registry=registry,
            engine=engine,
            preparer=TokenizingPreparer(
                settings.engine_address,
                settings.serving.base_model,
                settings.serving.context_tokens,
                open_storage(settings),
                settings.training,
            ),
            nodes=runs.nodes,
            settings=settings,
        )
        catalogue = Catalogue(led, settings)
        await catalogue.refresh()
        _tell_ready(settings)
        deployments = Deployments(led, engine, registry, catalogue.refresh, settings)
        await _together(Orchestrator(parts, owner).run(), catalogue.run(), deployments.run())

    settings.orchestrator_pid_file.unlink(missing_ok=True)  # of a predecessor that was killed
    try:
        await call(ensure_base_model, settings, settings.serving.base_model)
        async with shown(store, engine, settings.orchestrator):
            lease = timedelta(seconds=settings.orchestrator.lease_seconds)
            leading = asyncio.create_task(lead(store, lease, work, lambda: _tell_ready(settings)))
            stopping = asyncio.create_task(stop.wait())
            await asyncio.wait({leading, stopping}, return_when=asyncio.FIRST_COMPLETED)
            log.info("orchestrator_stopping")
            stopping.cancel()
            leading.cancel()
            await asyncio.wait({leading})  # before the store is closed behind it
            if not leading.cancelled() and (error := leading.exception()):
                raise error
    finally:
        settings.orchestrator_pid_file.unlink(missing_ok=True)
        await engine.close()
        await store.close()
    log.info("orchestrator_stopped")


def _tell_ready(settings: Settings) -> None:
    """Once it works, or stands by for another that does."""
    file = settings.orchestrator_pid_file
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(str(os.getpid()))
        log.info("orchestrator_ready")


async def _together(first: Coroutine[Any, Any, None], *beside: Coroutine[Any, Any, None]) -> None:
    """Until `first` ends or this is cancelled; what runs beside it has ended by then. Raises what `first` raises."""
    tasks = [asyncio.create_task(one) for one in (first, *beside)]
    try:
        await asyncio.wait(tasks[:1])
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        if not tasks[0].cancelled() and (error := tasks[0].exception()):
            raise error


def main() -> int:
    """Exit code 0 after a stop that was asked for, 1 when it cannot work."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the tokenizer runs in threads beside others
    import_tokenizers()
    configure_logging()
    try:
        settings = graft_settings.load()
        check_schema(settings.store_url)
        link = RayLink(settings.ray_address)
        link.connect()
        asyncio.run(serve(settings, RayRuns(link)))
    except GraftError as error:
        log.error("orchestrator_failed", error=error.message, reason=error.reason)
        return 1
    except ConnectionError as error:
        log.error("ray_unreachable", error=f"No Ray cluster answers at {settings.ray_address}: {error}")
        return 1
    except RuntimeError as error:  # Ray Client's word for other versions, and for a token that is refused
        log.error("ray_refused", error=f"The Ray cluster at {settings.ray_address} refuses: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
