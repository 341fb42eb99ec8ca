"""The version that a job goes on from: whether it exists, and whether the job can go on from it.

Knows of it what the read model tells; an adapter's alpha and modules are in its files, which the run compares.
"""

from collections.abc import Iterator

from graft.domain.errors import FieldViolation, InvalidArgument
from graft.domain.jobs import JobSpec, ServedAs, Tuning
from graft.domain.names import ModelName, parse_model
from graft.domain.resources import AdapterVersion, BaseModel


def start_name(spec: JobSpec, wrong: list[FieldViolation]) -> ModelName | None:
    """What `from_adapter` names, None without one or when it names no adapter of the job's base."""
    if spec.from_adapter is None:
        return None
    try:
        name = parse_model(spec.from_adapter, "from_adapter")
    except InvalidArgument as error:
        wrong += error.violations
        return None
    if name.adapter is None or name.base != spec.base_model:
        description = (
            f"{spec.from_adapter!r} is no adapter of {spec.base_model!r}; write {spec.base_model}:name@version"
        )
        wrong.append(FieldViolation("from_adapter", description))
        return None
    return name


def check_start(spec: JobSpec, base: BaseModel | None, start: AdapterVersion | None) -> Iterator[FieldViolation]:
    """Every fault of going on from `start`. LoRA goes on with the adapter's shape: no other can be asked for."""
    if start is None or base is None:
        return
    if start.base_model_digest != base.digest:
        yield FieldViolation(
            "from_adapter",
            f"{start.model} was trained on other weights of {base.id} ({start.base_model_digest}) than it has now "
            f"({base.digest}); leave it out and train from the base",
        )
    if spec.tuning is not Tuning.LORA:
        return
    if start.served_as is ServedAs.MERGED_MODEL:
        yield FieldViolation(
            "from_adapter",
            f"{start.model} is a full model, and an adapter trained on it would not fit {base.id}, which is served; "
            "tune full or last_layers to go on from it",
        )
        return
    if spec.lora.rank and start.rank and spec.lora.rank != start.rank:
        yield FieldViolation(
            "lora.rank",
            f"asks for {spec.lora.rank}, and {start.model}, which training starts from, has {start.rank}; leave it out",
        )
    for name in ("use_dora", "modules_to_save"):
        if getattr(spec.lora, name):
            yield FieldViolation(
                f"lora.{name}",
                f"is nothing that {start.model}, which training starts from, has; leave it out, or start from the base",
            )
