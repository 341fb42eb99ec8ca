"""REGISTERING: the run's adapter or model becomes a version without an alias, and the read model knows it at once."""

import asyncio
import time
from pathlib import Path

from graft.domain.errors import FailedPrecondition
from graft.domain.jobs import Job, JobState, ServedAs
from graft.orchestrator.context import Context
from graft.orchestrator.files import drop_copies
from graft.orchestrator.room import resolved_int
from graft.orchestrator.threads import ask_ray, call
from graft.registry.digest import FILES, MODEL_CONFIG
from graft.registry.mlflow_registry import Publication
from graft.training.spec import ADAPTER, MODEL, TRAINED_ADAPTER

REGISTERED = "registered"
"""Key of the event that tells the version; EVALUATING reads it back."""


async def register(context: Context) -> None:
    """Publishes (the registry finds a version that is there already by its job) and frees the run."""
    job, parts = context.job, context.parts
    context.room.free(job.id)
    material = await context.material()
    served_as = job.spec.served_as or ServedAs.ADAPTER
    merged = served_as is ServedAs.MERGED_MODEL
    await context.fetch_results()
    served = context.output_dir / (MODEL if merged else ADAPTER)
    if missing := [name for name in ((MODEL_CONFIG,) if merged else FILES) if not (served / name).is_file()]:
        raise FailedPrecondition(
            f"The run has finished, but runs/{job.id}/{job.attempt}/{served.name} lacks {' and '.join(missing)}.",
            reason="ADAPTER_MISSING",
        )
    # Both are idempotent and neither needs the other: ending worker processes takes seconds that publishing need not
    # wait for.
    release = asyncio.create_task(
        context.patiently("The training cluster", lambda: ask_ray(parts.runs.release, job.id, job.attempt))
    )
    try:
        run_id = await context.track(material).run_id()
        started = time.time()
        publication = Publication(
            project=job.project,
            base_model=job.spec.base_model,
            adapter=job.adapter,
            job_id=job.id,
            attempt=job.attempt,
            run_id=run_id,
            folder=None if merged else served,
            base_model_digest=material.base.digest,
            dataset_digest=material.dataset.digest,
            rank=_rank(job, served_as),
            metrics=job.metrics,
            task_definition=job.spec.task_definition,
            served_as=served_as,
            tuning=job.spec.tuning,
            model_folder=_there(context.output_dir / MODEL),
            trained_folder=_there(context.output_dir / TRAINED_ADAPTER),
        )
        version = await context.patiently("The registry", lambda: call(parts.registry.publish, publication))
        await context.patiently("The registry", context.mirror.refresh)
        await call(drop_copies, parts.storage, context.output_dir)
        await release
    finally:
        release.cancel()  # whatever else ended the step does not wait for the cluster
        await asyncio.wait({release})
    await context.say(
        REGISTERED,
        f"Registered as {version.model}.",
        {"version": version.version, "digest": version.digest, "publish_start_time_seconds": started},
    )
    await context.move(
        JobState.EVALUATING,
        f"{version.model} is a model of its own." if merged else f"Loading {version.model} for its evaluation.",
    )


def _rank(job: Job, served_as: ServedAs) -> int:
    if served_as is ServedAs.MERGED_MODEL:
        return 0
    return resolved_int(job, "delta_rank" if served_as is ServedAs.LOW_RANK_DELTA else "lora.rank", 0)


def _there(folder: Path) -> Path | None:
    return folder if folder.is_dir() else None
