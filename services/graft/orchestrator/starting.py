"""Training that goes on from a version (`from_adapter`): where it is, and what a job takes over from it.

LoRA keeps the shape that the adapter has; a job that asks for another is refused. Downloads through the registry.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from graft.domain.errors import FailedPrecondition, FieldViolation, InvalidArgument
from graft.domain.jobs import Job, Lora, Resolved, ServedAs, Tuning
from graft.domain.names import parse_model, registered_model
from graft.domain.resources import AdapterVersion
from graft.orchestrator.context import Context
from graft.orchestrator.threads import call
from graft.training.spec import StartFrom


async def start_from(context: Context) -> StartFrom | None:
    """The version that the job's training starts from, None for the base. Raises NotFound when it is gone."""
    version = await _version(context)
    if version is None:
        return None
    settings = context.parts.settings
    return StartFrom(
        model=version.model,
        registered_model=registered_model(version.project, version.base_model, version.adapter),
        version=version.version,
        digest=version.digest,
        tracking_uri=settings.tracking_uri,
        cache=str(settings.home.cache),
        served_as=version.served_as,
    )


async def with_start(context: Context) -> Job:
    """The job with LoRA's shape taken over from the adapter that it starts from.

    Raises FailedPrecondition when that adapter belongs to other weights of the base or is a model of its own, and
    InvalidArgument, naming both values, when the job asks for another shape.
    """
    job = context.job
    version = await _version(context)
    if version is None:
        return job
    base = await context.parts.store.get_base_model(job.spec.base_model)
    if version.base_model_digest != base.digest:
        raise FailedPrecondition(
            f"{version.model} was trained on other weights of {base.id} ({version.base_model_digest}) than it has now "
            f"({base.digest}). Train from the base.",
            reason="BASE_MODEL_CHANGED",
        )
    if job.spec.tuning is not Tuning.LORA:
        return job
    if version.served_as is ServedAs.MERGED_MODEL:
        raise FailedPrecondition(
            f"{version.model} is a full model: an adapter trained on it would not fit {base.id}, which is served. Use "
            "tuning: full or last_layers to go on from it.",
            reason="STARTS_FROM_MODEL",
        )
    name = registered_model(version.project, version.base_model, version.adapter)
    pull = context.parts.registry.pull
    folder = await context.patiently("The registry", lambda: call(pull, name, version.version, version.digest))
    lora = take_over(job.spec.lora, adapter_lora(folder), version.model)
    return replace(job, spec=replace(job.spec, lora=lora))


def say_start(job: Job, resolved: tuple[Resolved, ...]) -> tuple[Resolved, ...]:
    """The resolved hyperparameters, where what was taken over from the start says so. `job`: as it was asked for."""
    if job.spec.from_adapter is None or job.spec.tuning is not Tuning.LORA:
        return resolved
    asked = job.spec.lora
    taken = {"lora.rank": asked.rank, "lora.alpha": asked.alpha, "lora.target_modules": asked.target_modules}
    return tuple(
        replace(item, derived=True, reason=f"As {job.spec.from_adapter} has it.")
        if item.name in taken and not taken[item.name]
        else item
        for item in resolved
    )


def adapter_lora(folder: Path) -> Lora:
    """The shape of a LoRA adapter, from PEFT's configuration. Raises FailedPrecondition for what cannot be read."""
    try:
        config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
        modules = config["target_modules"]
        return Lora(
            rank=int(config["r"]),
            alpha=float(config["lora_alpha"]),
            target_modules=(modules,) if isinstance(modules, str) else tuple(sorted(modules)),
            use_rslora=bool(config.get("use_rslora")),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FailedPrecondition(
            f"The adapter's adapter_config.json cannot be read ({type(error).__name__}: {error}).",
            reason="ADAPTER_INVALID",
        ) from error


def take_over(asked: Lora, has: Lora, model: str) -> Lora:
    """`asked` with the adapter's shape. Raises InvalidArgument for every field that is asked for and differs."""

    def faults() -> Iterator[FieldViolation]:
        pairs: list[tuple[str, Any, Any]] = [
            ("rank", asked.rank, has.rank),
            ("alpha", asked.alpha, has.alpha),
            ("target_modules", tuple(sorted(asked.target_modules)), has.target_modules),
            ("use_rslora", asked.use_rslora, has.use_rslora),
            ("use_dora", asked.use_dora, has.use_dora),
            ("modules_to_save", asked.modules_to_save, has.modules_to_save),
        ]
        for name, wanted, found in pairs:
            if wanted and wanted != found:
                told = [", ".join(value) if isinstance(value, tuple) else value for value in (wanted, found)]
                yield FieldViolation(
                    f"lora.{name}",
                    f"asks for {told[0]}, and {model}, which training starts from, has {told[1] or 'none'}",
                )

    if wrong := tuple(faults()):
        raise InvalidArgument(
            " ".join(f"{fault.field}: {fault.description}." for fault in wrong)
            + " Leave it out, or start from the base.",
            reason="START_DIFFERS",
            violations=wrong,
        )
    return replace(asked, rank=has.rank, alpha=has.alpha, target_modules=has.target_modules, use_rslora=has.use_rslora)


async def _version(context: Context) -> AdapterVersion | None:
    job = context.job
    if job.spec.from_adapter is None:
        return None
    name = parse_model(job.spec.from_adapter, "from_adapter")
    if name.adapter is None:
        return None
    return await context.parts.store.resolve_version(
        job.project, name.base, name.adapter, version=name.version, alias=name.alias
    )
