"""EVALUATING: proves in the engine that will serve it that the adapter is the one that was trained, and promotes it.

Parity: the trainer scored a few examples after its last step (`graft.json`); the engine scores the same tokens with the
loaded version. A wrong scale, a missing module or a mixed-up file shows as a difference of tenths of a nat and more.
"""

import json
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from graft.domain.errors import FailedPrecondition, GraftError, Internal, Unavailable
from graft.domain.jobs import EventLevel, JobState, ServedAs
from graft.domain.names import registered_model
from graft.domain.resources import AdapterVersion, BaseModel
from graft.internal.v1 import engine_pb2
from graft.orchestrator.context import Context
from graft.orchestrator.patience import answered
from graft.orchestrator.ports import Generates
from graft.orchestrator.registering import REGISTERED
from graft.settings import ServingSettings

log = structlog.get_logger()

PARITY_NATS = 0.05
"""Largest allowed difference of the mean log-probability of a probe's completion, per token, where trainer and engine
compute in float32. What remains is the order of summation (1e-4 and less), and 0.05 would change no answer that
matters."""
HALF_PARITY_NATS = 0.25
"""The same where either computes in 16 bits. bfloat16 keeps 8 significant bits: logits from 16 to 32 lie 0.125 apart,
and a log-probability is the difference of two (0.06 measured at 135M parameters)."""
GENERATE_TIMEOUT_SECONDS = 120.0
"""A probe is one prefill; a busy engine answers it after what is queued."""


@dataclass(frozen=True)
class Probe:
    """An example as the trainer scored it."""

    prompt_token_ids: list[int]
    completion_token_ids: list[int]
    mean_logprob: float
    """Mean over the completion's tokens, in nats."""


@dataclass(frozen=True)
class Trained:
    """What the trainer left as proof, `graft.json`."""

    probes: list[Probe]
    dtype: str
    """What it computed in, for example `bfloat16`."""


async def evaluate(context: Context) -> None:
    """Loads the version, proves parity, applies the gate. Raises FailedPrecondition PARITY_FAILED.

    A model of its own is not loaded: it does not fit beside the base in the shared engine.
    """
    job, parts = context.job, context.parts
    said = context.said.get(REGISTERED)
    if said is None:
        raise Internal(f"Job {job.id!r} is evaluated, but none of its events names its version.", reason="NO_VERSION")
    version = await parts.store.resolve_version(
        job.project, job.spec.base_model, job.adapter, version=int(str(said["version"])), alias=None
    )
    if version.served_as is ServedAs.MERGED_MODEL:
        await context.say(
            "deploy",
            f"{version.model} is a full model and is not loaded beside the adapters. Serve it with "
            f"`graft models deploy {version.model}`.",
            metrics={"model_bytes": float(version.size_bytes)},
        )
        await _finish(context, version, f"{version.model} is trained.")
        return
    adapter = adapter_ref(version)
    engine = parts.engine.of(version.base_model)
    loaded = await context.patiently("The engine", lambda: answered(engine.load(adapter)))
    metrics = {"adapter_bytes": float(version.size_bytes), "load_seconds": loaded.load_seconds}
    if isinstance(started := said.get("publish_start_time_seconds"), int | float):
        metrics["publish_seconds"] = max(time.time() - started, 0.0)
    await context.say("loaded", f"{version.model} is loaded.", {"load_seconds": loaded.load_seconds}, metrics=metrics)

    await context.fetch_results()  # another orchestrator may have registered it, on another host
    trained = read_trained(context.output_dir / "adapter" / "graft.json")
    dtypes = {trained.dtype, *(replica.dtype for replica in loaded.replicas)}
    limit = PARITY_NATS if dtypes <= {"float32"} else HALF_PARITY_NATS
    base = await parts.store.get_base_model(version.base_model)
    context_tokens = engine_context_tokens(base, parts.settings.serving)
    fitting = [probe for probe in trained.probes if fits(probe, context_tokens)]
    if not fitting:
        raise FailedPrecondition(
            f"None of the {len(trained.probes)} probes of {version.model} can be scored by the engine, so that nothing "
            "proves that it serves what was trained.",
            reason="PARITY_FAILED",
        )
    difference = 0.0
    for probe in fitting:
        mean_logprob = await context.patiently("The engine", partial(score, engine, adapter, probe))
        difference = max(difference, abs(mean_logprob - probe.mean_logprob))
    text = f"Parity of {version.model} over {len(fitting)} probes: the engine differs by at most {difference:.4f} nats."
    passed = difference <= limit
    await context.say(
        "parity",
        text,
        {"max_abs_difference": difference, "probes": len(fitting), "limit": limit},
        level=EventLevel.INFO if passed else EventLevel.ERROR,
        metrics={"parity_max_abs_difference": difference},
    )
    if not passed:
        try:
            await engine.unload(version.digest)
        except GraftError as error:  # it leaves by itself when others need its place
            log.warning("not_unloaded", model=version.model, error=error.message)
        raise FailedPrecondition(
            f"The engine does not compute what was trained: its log-probabilities differ by up to {difference:.4f} "
            f"nats a token from the trainer's, and {limit} is allowed. {version.model} gets no alias.",
            reason="PARITY_FAILED",
            metadata={"max_abs_difference": f"{difference:.6f}"},
        )
    await _finish(context, version, f"{version.model} is trained, proven and loaded.")


async def _finish(context: Context, version: AdapterVersion, message: str) -> None:
    """Promotes the version if it is its adapter's first, and ends the job and its MLflow run."""
    if await context.patiently("The registry", lambda: context.mirror.promote_first(version)):
        await context.say("champion", f"{version.model} is its adapter's champion.")
    tracker = context.track(await context.material())
    tracker.log(context.job.metrics, context.job.progress.step if context.job.progress else 0)
    tracker.finish("FINISHED")
    await context.move(JobState.SUCCEEDED, message, fine_tuned_model=version.model)


def adapter_ref(version: AdapterVersion) -> engine_pb2.AdapterRef:
    """The version as the engine is told of it."""
    return engine_pb2.AdapterRef(
        model=version.model,
        registered_model=registered_model(version.project, version.base_model, version.adapter),
        version=version.version,
        digest=version.digest,
    )


def read_trained(path: Path) -> Trained:
    """A run's `graft.json`. Raises FailedPrecondition when the file cannot be read as that."""
    try:
        about = json.loads(path.read_text())
        probes = [
            Probe(
                [int(token) for token in probe["prompt_token_ids"]],
                [int(token) for token in probe["completion_token_ids"]],
                float(probe["mean_logprob"]),
            )
            for probe in about["probes"]
        ]
        if wrong := [probe.mean_logprob for probe in probes if not math.isfinite(probe.mean_logprob)]:
            raise ValueError(f"mean_logprob is {wrong[0]}")
        return Trained(probes, str(about["dtype"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FailedPrecondition(
            f"The run's {path.name} holds no readable probes ({type(error).__name__}: {error}).",
            reason="PARITY_FAILED",
        ) from error


async def score(engine: Generates, adapter: engine_pb2.AdapterRef, probe: Probe) -> float:
    """The engine's mean log-probability of the probe's completion, in nats a token.

    An `adapter` without a digest is a base model. `prompt_logprobs: 0` is vLLM's extension of the completions API: for
    each prompt token its own log-probability.
    Raises Unavailable while the engine cannot answer, FailedPrecondition for an answer without scores.
    """
    body = {
        "model": adapter.model,
        "prompt": [*probe.prompt_token_ids, *probe.completion_token_ids],
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": 0,
    }
    request = engine_pb2.GenerateRequest(
        endpoint=engine_pb2.ENDPOINT_COMPLETIONS,
        body=json.dumps(body).encode(),
        adapter=adapter if adapter.digest else None,
        public_model=adapter.model,
    )
    response = await answered(engine.generate(request, GENERATE_TIMEOUT_SECONDS))
    if response.http_status in (429, 503):
        raise Unavailable("The engine is overloaded.", reason="ENGINE_OVERLOADED")
    if response.http_status != 200:
        raise FailedPrecondition(
            f"The engine refused to score a probe of {adapter.model} (HTTP {response.http_status}): "
            f"{_message(response.body)}",
            reason="PARITY_FAILED",
        )
    try:
        positions: list[Any] = json.loads(response.body)["choices"][0]["prompt_logprobs"]
        first = len(probe.prompt_token_ids)
        logprobs = [
            float(positions[first + index][str(token)]["logprob"])
            for index, token in enumerate(probe.completion_token_ids)
        ]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise FailedPrecondition(
            f"The engine's answer for a probe of {adapter.model} has no prompt_logprobs for each of its tokens "
            f"({type(error).__name__}: {error}).",
            reason="PARITY_FAILED",
        ) from error
    mean_logprob = sum(logprobs) / len(logprobs)
    if not math.isfinite(mean_logprob):
        raise FailedPrecondition(
            f"The engine gives {adapter.model} log-probabilities that are no numbers ({mean_logprob}).",
            reason="PARITY_FAILED",
        )
    return mean_logprob


def engine_context_tokens(base: BaseModel, serving: ServingSettings) -> int:
    """Longest prompt plus answer that the base's engine takes (`graft.serving.engine` starts it so)."""
    return min(base.context_tokens, serving.context_tokens)


def fits(probe: Probe, context_tokens: int) -> bool:
    """Whether the engine can score it."""
    # The engine must have room for the one token that every request generates.
    return bool(probe.completion_token_ids) and (
        len(probe.prompt_token_ids) + len(probe.completion_token_ids) < context_tokens
    )


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return "no reason was given"
