"""REGISTERING: the run's adapter becomes a version without an alias, and the read model knows it at once."""

import asyncio
import time

from graft.domain.errors import FailedPrecondition
from graft.domain.jobs import JobState
from graft.orchestrator.context import Context
from graft.orchestrator.following import ask_ray
from graft.orchestrator.room import resolved_int
from graft.orchestrator.threads import call
from graft.registry.digest import FILES
from graft.registry.mlflow_registry import Publication

REGISTERED = "registered"
"""Key of the event that tells the version; EVALUATING reads it back."""


async def register(context: Context) -> None:
    """Publishes (the registry finds a version that is there already by its job) and frees the run."""
    job, parts = context.job, context.parts
    context.room.free(job.id)
    material = await context.material()
    folder = context.output_dir / "adapter"
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise FailedPrecondition(
            f"The run has finished, but runs/{job.id}/{job.attempt}/adapter lacks {' and '.join(missing)}.",
            reason="ADAPTER_MISSING",
        )
    # Both are idempotent and neither needs the other: ending worker processes takes seconds that publishing need not
    # wait for.
    release = asyncio.create_task(ask_ray(parts.runs.release, job.id, job.attempt))
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
            folder=folder,
            base_model_digest=material.base.digest,
            dataset_digest=material.dataset.digest,
            rank=resolved_int(job, "lora.rank", 0),
            metrics=job.metrics,
            task_definition=job.spec.task_definition,
        )
        version = await context.patiently("The registry", lambda: call(parts.registry.publish, publication))
        await context.patiently("The registry", context.mirror.refresh)
    finally:
        await asyncio.wait({release})
    release.result()
    await context.say(
        REGISTERED,
        f"Registered as {version.model}.",
        {"version": version.version, "digest": version.digest, "publish_start_time_seconds": started},
    )
    await context.move(JobState.EVALUATING, f"Loading {version.model} for its evaluation.")
