"""A job's straight way: one function a state, each safe to run again from its start.

A step reads what is there, does what is missing and moves the job on. It never asks who did the rest: that is how
another orchestrator adopts the job exactly where it is. Cancellation, failure and the lease are the loop's.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import asdict

from graft.domain.jobs import EventLevel, JobState, Method, Resolved
from graft.orchestrator.context import Context
from graft.orchestrator.evaluating import evaluate
from graft.orchestrator.following import follow, give_up_attempt, poll
from graft.orchestrator.newer import unknown_hyperparameters
from graft.orchestrator.placing import NodesWait
from graft.orchestrator.ports import PreparedData
from graft.orchestrator.registering import register
from graft.orchestrator.room import with_concurrency
from graft.orchestrator.sampling import check_engine
from graft.orchestrator.starting import say_start, start_from, with_start
from graft.orchestrator.threads import ask_ray, call, to_the_end
from graft.storage import share_base_model

__all__ = ["STEPS"]


async def validate(context: Context) -> None:
    """VALIDATING: reads the data as training will and fixes every hyperparameter. Raises what is wrong with them."""
    if not context.job.resolved:
        await _settle(context, "resolved", "Hyperparameters")
    await check_engine(context)
    context.room.line_up(context.job)
    await context.move(JobState.QUEUED, "The data is valid. Waiting for room to train.")


async def queue(context: Context) -> None:
    """QUEUED: waits for room. Raises FailedPrecondition for a job that can never have it."""
    attempt = context.job.attempt
    if unknown := unknown_hyperparameters(context.job):
        why = f"Hyperparameters, derived again without a newer version's {', '.join(unknown)}"
        await _settle(context, f"resolved-{attempt}", why)
    waited = any(f"queued-{key}-{attempt}" in context.said for key in ("nodes", "room"))
    turn = context.room.turn(context.job, lambda key, message: context.say(f"queued-{key}-{attempt}", message), waited)
    async with turn as granted:
        if context.job.spec.sweep:
            await context.record(resolved=with_concurrency(context.job, granted))
        await context.move(JobState.STARTING, "Starting the training workers.")


async def start(context: Context) -> None:
    """STARTING: starts the run, or finds it started, and waits for nodes and its first report."""
    job, parts = context.job, context.parts
    if (unknown := unknown_hyperparameters(job)) and not (await poll(context, 0)).exists:
        context.room.line_up(job)
        what = f"A newer orchestrator has derived {', '.join(unknown)}, and has started no run. Trying again without."
        await context.move(JobState.QUEUED, what, next_attempt=True)
        return
    material = await context.material()
    base = material.base
    context.track(material)
    await context.patiently("The storage", lambda: call(share_base_model, parts.storage, base.path, base.digest))
    spec = parts.preparer.plan(
        job, base, material.dataset, material.validation, context.output_dir, await start_from(context)
    )
    await context.record()  # the store's fence: a run that was started too late would be nobody's
    await context.patiently("The training cluster", lambda: to_the_end(ask_ray(parts.runs.start, spec)))
    nodes = NodesWait(context)
    while not (status := await poll(context, 0)).reports:
        if not (status.exists and status.alive):
            await give_up_attempt(context)
            return
        await nodes.look(status.placed)
        await asyncio.sleep(parts.settings.orchestrator.poll_seconds)
    await context.move(JobState.RUNNING, "Training.")


async def run(context: Context) -> None:
    """RUNNING: follows the run."""
    await follow(context)


async def _settle(context: Context, key: str, what: str) -> None:
    """Reads the data, derives every hyperparameter and tells both. `what` begins a sentence."""
    material = await context.material()
    job = await with_start(context)
    data = (material.dataset, material.validation)
    prepare = context.parts.preparer.prepare
    prepared = await context.patiently("The storage", lambda: call(prepare, job, material.base, *data))
    resolved = say_start(context.job, prepared.resolved)
    await _tell_data(context, prepared)
    if prepared.memory is not None:
        text = f"Training needs about {prepared.memory} in a worker."
        await context.say("memory", text, {**asdict(prepared.memory), "total_bytes": prepared.memory.total_bytes})
    await context.say(
        key,
        f"{what}: " + ", ".join(f"{item.name}={_value(item)}" for item in resolved) + ".",
        {
            "hyperparameters": {
                item.name: {"value": item.value, "derived": item.derived, "reason": item.reason} for item in resolved
            }
        },
        resolved=resolved,
    )


def _value(item: Resolved) -> str:
    return "/".join(map(str, item.value)) if isinstance(item.value, list) else str(item.value)


async def _tell_data(context: Context, prepared: PreparedData) -> None:
    policy = context.job.spec.hyperparameters.over_length_policy
    parts = [("training", prepared.training), ("validation", prepared.validation)]
    for name, stats in parts:
        if stats is None:
            continue
        text = (
            f"The {name} data: {stats.row_count} rows, {stats.example_count} examples, {stats.tokens} tokens "
            f"({stats.completion_tokens} of completions), the longest example {stats.longest_tokens}."
        )
        cut = context.job.spec.method is Method.SELF_SUPERVISED
        if stats.over_length_count:
            what = "they are cut into pieces" if cut else f"policy: {policy.value}"
            text += f" {stats.over_length_count} are longer than the context; {what}."
        await context.say(
            f"data-{name}",
            text,
            {
                "row_count": stats.row_count,
                "example_count": stats.example_count,
                "tokens": stats.tokens,
                "completion_tokens": stats.completion_tokens,
                "longest_tokens": stats.longest_tokens,
                "median_tokens": stats.median_tokens,
                "over_length_count": stats.over_length_count,
                "over_length_policy": policy.value,
            },
            level=EventLevel.WARN if stats.over_length_count and not cut else EventLevel.INFO,
        )


STEPS: dict[JobState, Callable[[Context], Awaitable[None]]] = {
    JobState.VALIDATING: validate,
    JobState.QUEUED: queue,
    JobState.STARTING: start,
    JobState.RUNNING: run,
    JobState.REGISTERING: register,
    JobState.EVALUATING: evaluate,
}
