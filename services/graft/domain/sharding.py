"""What can train with its base's weights spread over the workers, and what cannot yet, with the reason."""

from collections.abc import Iterator

from graft.domain.errors import FieldViolation
from graft.domain.jobs import JobSpec, Lora, Method, Sharding

NEVER_SHARDED = "leave it out, or use hyperparameters.sharding: auto, which keeps a whole copy in each worker here"


def unshardable(method: Method | None, lora: Lora) -> Iterator[FieldViolation]:
    """Every choice of a training that needs the whole base in each worker."""
    if method is Method.REINFORCEMENT:
        yield FieldViolation(
            "hyperparameters.sharding",
            "reinforcement hands its adapter to the inference service after each update, which is done from a whole "
            "copy only; leave sharding out",
        )
    if lora.base_quantization:
        yield FieldViolation(
            "lora.base_quantization", f"rounds the base to blocks of weights that cannot be spread; {NEVER_SHARDED}"
        )
    for field, wanted in (("lora.use_dora", lora.use_dora), ("lora.modules_to_save", bool(lora.modules_to_save))):
        if wanted:
            yield FieldViolation(
                field, f"is merged into a whole copy of the base when training has ended; {NEVER_SHARDED}"
            )


def check_sharding(spec: JobSpec) -> Iterator[FieldViolation]:
    """Every reason for which a job that asks for sharding cannot have it."""
    if spec.hyperparameters.sharding is not Sharding.ALWAYS:
        return
    yield from unshardable(spec.method, spec.lora)
    if spec.sweep is not None:
        yield FieldViolation("hyperparameters.sharding", "each trial of a sweep is one worker; leave sharding out")
    elif (spec.hyperparameters.num_workers or 1) < 2:
        yield FieldViolation(
            "hyperparameters.sharding", "spreads the base over workers: set num_workers to 2 or more, or leave it out"
        )
