"""What reinforcement needs of the inference service around a run: that it is there, and that nothing is left in it.

The run itself loads and unloads its policies (`graft.training.policies`); a run that was killed cannot.
"""

import asyncio
import shutil

import structlog

from graft.domain.errors import FailedPrecondition, GraftError, Unavailable
from graft.domain.jobs import Method
from graft.internal.v1 import engine_pb2
from graft.orchestrator.context import Context
from graft.orchestrator.threads import call
from graft.training.spec import POLICIES, policy_folder, policy_prefix, run_key

log = structlog.get_logger()

LOOKS_AFTER_KILL = 3
"""A killed run's last request to load may reach the engine after the first look; two more find it."""
LOOK_SECONDS = 0.25
FORGET_SECONDS = 30.0
"""An engine that takes longer to let go is in trouble of its own, and evicts what nobody uses."""


async def check_engine(context: Context) -> None:
    """Waits for the engine that rollouts are sampled from. Raises FailedPrecondition when it serves other weights, and
    Unavailable when it stays away. Other methods do not need it until they have trained."""
    if context.job.spec.method is not Method.REINFORCEMENT:
        return
    base = await context.parts.store.get_base_model(context.job.spec.base_model)
    for replica in await context.patiently("The engine", lambda: _ready(context)):
        if (replica.base_model, replica.base_model_digest) != (base.id, base.digest):
            raise FailedPrecondition(
                f"Reinforcement samples from the inference service, which serves {replica.base_model} with the weights "
                f"{replica.base_model_digest}, and not {base.id} with {base.digest}. Train the base that is served.",
                reason="BASE_MODEL_NOT_SERVED",
            )


async def forget_policies(context: Context, looks: int = 1) -> None:
    """Takes the job's policies out of the engine and deletes their files. What fails is logged: the job's end must not
    wait for it."""
    job = context.job
    if job.spec.method is not Method.REINFORCEMENT:
        return
    try:
        async with asyncio.timeout(FORGET_SECONDS):
            for look in range(looks):
                if look:
                    await asyncio.sleep(LOOK_SECONDS)
                await _unload(context, policy_prefix(job.spec.base_model, job.id))
        if (storage := context.parts.storage).shared:
            await call(storage.delete, storage.uri(run_key(job.id, job.attempt), POLICIES))
    except (GraftError, TimeoutError) as error:
        log.warning("policies_not_unloaded", job=job.id, error=str(error) or "no answer in time")
        return  # with their files: an engine that comes back reads again what it held
    await call(shutil.rmtree, policy_folder(context.output_dir), ignore_errors=True)


async def _unload(context: Context, prefix: str) -> None:
    engine = context.parts.engine.of(context.job.spec.base_model)
    replicas = (await engine.residency()).replicas
    held = [resident for replica in replicas for resident in replica.adapters if resident.model.startswith(prefix)]
    for digest in {resident.digest for resident in held}:
        await engine.unload(digest)


async def _ready(context: Context) -> list[engine_pb2.Replica]:
    replicas = list((await context.parts.engine.of(context.job.spec.base_model).residency()).replicas)
    if not replicas or not all(replica.ready for replica in replicas):
        raise Unavailable("It is starting.", reason="ENGINE_STARTING")
    return replicas
