"""What a request must satisfy before it is stored. All faults of a job are reported together.

Knows the catalogue and the data sets through the store; whether an example fits the context is found when the job runs.
"""

import math
import re
from collections.abc import Awaitable, Iterator
from dataclasses import fields, replace
from typing import TypeVar

from graft.domain.errors import FieldViolation, GraftError, InvalidArgument, NotFound
from graft.domain.jobs import Hyperparameters, JobSpec, Lora
from graft.domain.names import check_id
from graft.domain.resources import BaseModel, Dataset
from graft.settings import Settings
from graft.store.protocol import Store

T = TypeVar("T")

DEFAULT_PAGE_SIZE = 50
MAX_PAGE_SIZE = 1000
METHODS = ("supervised",)
ALL_LINEAR = "all-linear"
MAX_REQUEST_ID_CHARACTERS = 128
"""A UUID4 has 36; the `openai` client's own idempotency keys are longer."""

RANGES: dict[str, tuple[float, float, bool]] = {
    # name: (least, most, whether the least itself is allowed). The upper ends catch slips of the keyboard.
    "epochs": (0, 1000, False),
    "max_steps": (1, 10_000_000, True),
    "batch_size": (1, 65_536, True),
    "learning_rate": (0, 1, False),
    "learning_rate_multiplier": (0, 100, False),
    "warmup_ratio": (0, 1, True),
    "weight_decay": (0, 1, True),
    "max_grad_norm": (0, 1000, False),
    "context_tokens": (8, math.inf, True),
    "seed": (0, 2**31 - 1, True),
    "num_workers": (1, 1024, True),
    "checkpoint_steps": (1, 10_000_000, True),
}
_RESERVED_SUFFIX = re.compile(r"latest|v[0-9]+")


def check_page_size(page_size: int) -> int:
    """50 for 0, at most 1000; raises InvalidArgument below 0."""
    if page_size < 0:
        raise InvalidArgument(
            "page_size: must not be negative",
            reason="INVALID_PAGE_SIZE",
            violations=(FieldViolation("page_size", "must not be negative"),),
        )
    return min(page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)


def check_request_id(request_id: str | None) -> str | None:
    """None for an empty one; raises InvalidArgument when it is longer than 128 characters."""
    if request_id and len(request_id) > MAX_REQUEST_ID_CHARACTERS:
        description = f"is longer than {MAX_REQUEST_ID_CHARACTERS} characters; use a UUID4"
        raise InvalidArgument(
            f"request_id: {description}",
            reason="INVALID_REQUEST_ID",
            violations=(FieldViolation("request_id", description),),
        )
    return request_id or None


async def check_job(store: Store, settings: Settings, project: str, spec: JobSpec) -> JobSpec:
    """Returns the specification with `all-linear` written as the empty tuple that means it.

    Raises InvalidArgument with every fault. When the only faults are names that do not exist, raises NotFound.
    """
    missing: list[FieldViolation] = []
    base = await _found(store.get_base_model(spec.base_model), "base_model", missing)
    training = await _found(store.get_dataset(project, spec.training_dataset), "training_dataset", missing)
    validation = None
    if spec.validation_dataset is not None:
        validation = await _found(store.get_dataset(project, spec.validation_dataset), "validation_dataset", missing)
    wrong = [
        *_check_names(spec),
        *_check_lora(spec.lora, base, settings),
        *_check_hyperparameters(spec.hyperparameters, base),
        *_check_data(training, validation),
        *_check_metadata(spec.metadata),
    ]
    if wrong or missing:
        violations = (*wrong, *missing)
        kind: type[GraftError] = InvalidArgument if wrong else NotFound
        raise kind(
            " ".join(f"{fault.field}: {fault.description.rstrip('.')}." for fault in violations),
            reason="INVALID_JOB" if wrong else f"{missing[0].field.upper()}_NOT_FOUND",
            violations=violations,
        )
    if spec.lora.target_modules == (ALL_LINEAR,):
        return replace(spec, lora=replace(spec.lora, target_modules=()))
    return spec


async def _found(lookup: Awaitable[T], field: str, missing: list[FieldViolation]) -> T | None:
    try:
        return await lookup
    except NotFound as error:
        missing.append(FieldViolation(field, error.message))
        return None


def _check_names(spec: JobSpec) -> Iterator[FieldViolation]:
    if spec.method not in METHODS:
        yield FieldViolation("method", f"{spec.method!r} is not a method; use one of: {', '.join(METHODS)}")
    if spec.suffix is None:
        return
    try:
        check_id(spec.suffix, "suffix")
    except InvalidArgument as error:
        yield from error.violations
    if _RESERVED_SUFFIX.fullmatch(spec.suffix):
        yield FieldViolation(
            "suffix", f"{spec.suffix!r} reads as a version; neither 'latest' nor 'v<number>' is allowed"
        )


def _check_lora(lora: Lora, base: BaseModel | None, settings: Settings) -> Iterator[FieldViolation]:
    # The catalogue may promise more than the engine was started with; what cannot be served is not trained.
    highest = min(settings.serving.max_lora_rank, base.max_lora_rank if base else settings.serving.max_lora_rank)
    if lora.rank and not 1 <= lora.rank <= highest:
        yield FieldViolation(
            "lora.rank",
            f"{lora.rank} cannot be loaded by the inference service: use 1 to {highest} "
            "(GRAFT_SERVING_MAX_LORA_RANK), or leave it out",
        )
    if not (math.isfinite(lora.alpha) and 0 <= lora.alpha <= 100_000):
        yield FieldViolation("lora.alpha", f"{lora.alpha} is outside (0, 100000]; leave it out for twice the rank")
    if not 0 <= lora.dropout < 1:
        yield FieldViolation("lora.dropout", f"{lora.dropout} is outside [0, 1)")
    if base is None or lora.target_modules == (ALL_LINEAR,):
        return
    known = f"{base.id} has: {', '.join(base.target_modules)}; or {ALL_LINEAR!r} alone"
    for index, module in enumerate(lora.target_modules):
        if module not in base.target_modules:
            yield FieldViolation(
                f"lora.target_modules[{index}]", f"{module!r} cannot be loaded by the inference service; {known}"
            )
        elif module in lora.target_modules[:index]:
            yield FieldViolation(f"lora.target_modules[{index}]", f"{module!r} is named twice")


def _check_hyperparameters(asked: Hyperparameters, base: BaseModel | None) -> Iterator[FieldViolation]:
    for name in (field.name for field in fields(asked) if field.name in RANGES):
        value = getattr(asked, name)
        least, most, closed = RANGES[name]
        if name == "context_tokens" and base is not None:
            most = base.context_tokens
        if value is None or (least <= value <= most and (closed or value != least)):
            continue
        upper = "infinity)" if math.isinf(most) else f"{most}]"
        yield FieldViolation(f"hyperparameters.{name}", f"{value} is outside {'[' if closed else '('}{least}, {upper}")
    if asked.learning_rate is not None and asked.learning_rate_multiplier is not None:
        yield FieldViolation(
            "hyperparameters.learning_rate_multiplier",
            "multiplies the derived learning rate, and learning_rate is given; give one of them",
        )


def _check_data(training: Dataset | None, validation: Dataset | None) -> Iterator[FieldViolation]:
    if training and validation and training.digest == validation.digest:
        yield FieldViolation(
            "validation_dataset", "has the same content as the training data set; a held-out loss needs other rows"
        )


def _check_metadata(metadata: dict[str, str]) -> Iterator[FieldViolation]:
    # OpenAI's limits, so that a job made here is readable there.
    if len(metadata) > 16:
        yield FieldViolation("metadata", f"has {len(metadata)} pairs; 16 are allowed")
    for key, value in metadata.items():
        if not 1 <= len(key) <= 64 or len(value) > 512:
            yield FieldViolation(f"metadata[{key[:64]!r}]", "keys have 1 to 64 characters, values at most 512")
