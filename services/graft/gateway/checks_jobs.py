"""What a job must satisfy before it is stored. All its faults are reported together.

Knows the catalogue, the data sets and the registry's read model through the store; whether an example fits the context
is found when the job runs.
"""

import asyncio
import math
import re
from collections.abc import Awaitable, Iterator
from dataclasses import fields, replace
from typing import TypeVar

from graft.domain.errors import FieldViolation, GraftError, InvalidArgument, NotFound
from graft.domain.grading import check_grader
from graft.domain.jobs import (
    DEFAULT_BLOCKS,
    DEFAULT_COMPLETION_TOKENS,
    Hyperparameters,
    JobSpec,
    LastLayers,
    Lora,
    Method,
    ServedAs,
    Tuning,
)
from graft.domain.names import check_id
from graft.domain.resources import AdapterVersion, BaseModel, Dataset
from graft.domain.sharding import check_sharding
from graft.gateway.checks_graders import check_rows, with_reference
from graft.gateway.checks_start import check_start, start_name
from graft.gateway.checks_sweep import check_sweep
from graft.gateway.checks_tasks import with_task
from graft.gateway.uploads import on_this_host
from graft.settings import Settings
from graft.store.protocol import Store

T = TypeVar("T")

ALL_LINEAR = "all-linear"
HEAD = "lm_head"
"""The one module that `modules_to_save` may name: adapters never touch norms, and embeddings are tied to it."""
MAX_MODULES = 64
"""Named by a job; a llama has seven kinds of linear layers."""

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
    "validation_fraction": (0, 0.5, False),
    "early_stopping_patience": (0, 10_000, True),
    "eval_steps": (0, 10_000_000, True),
}
_RESERVED_SUFFIX = re.compile(r"latest|v[0-9]+")


METHOD_OF_FORMAT = {
    "text": Method.SELF_SUPERVISED,
    "preference": Method.PREFERENCE,
    "openai_preference": Method.PREFERENCE,
    "graded_prompts": Method.REINFORCEMENT,
}
"""The method of a job that names none; every other format is learned supervised."""
_CHATS = frozenset({"messages", "question_answer", "alpaca", "sharegpt"})
FORMATS_OF_METHOD = {
    Method.SUPERVISED: _CHATS | {"prompt_completion"},
    Method.SELF_SUPERVISED: frozenset({"text"}),
    Method.INSTRUCTION: _CHATS,
    Method.PREFERENCE: frozenset({"preference", "openai_preference"}),
    Method.REINFORCEMENT: frozenset({"graded_prompts"}),
}
"""Formats by name. With a task's template, rows of named fields are learned supervised or by reinforcement as well."""
WITH_TASK = frozenset({Method.SUPERVISED, Method.INSTRUCTION, Method.REINFORCEMENT})


async def check_job(store: Store, settings: Settings, project: str, spec: JobSpec) -> JobSpec:
    """Returns the specification with everything chosen that its data and what it tunes decide: the method, the task's
    definition, how the result is served, the version behind an alias; and `all-linear` as the empty tuple it means.

    Raises InvalidArgument with every fault. When the only faults are names that do not exist, raises NotFound.
    """
    missing: list[FieldViolation] = []
    base = await _found(store.get_base_model(spec.base_model, project), "base_model", missing)
    training = await _found(store.get_dataset(project, spec.training_dataset), "training_dataset", missing)
    validation = None
    if spec.validation_dataset is not None:
        validation = await _found(store.get_dataset(project, spec.validation_dataset), "validation_dataset", missing)
    wrong: list[FieldViolation] = []
    start = await _start(store, project, spec, wrong, missing)
    here = training and await on_this_host(settings, training)
    spec, unfit = await with_task(spec, here, validation, start)
    wrong += unfit
    if spec.method is None:
        known = METHOD_OF_FORMAT.get(training.format.value) if training else None
        spec = replace(spec, method=known or Method.SUPERVISED)
    if spec.served_as is None:
        spec = replace(spec, served_as=ServedAs.ADAPTER if loads_as_it_is(spec) else ServedAs.LOW_RANK_DELTA)
    if spec.reinforcement.grader is not None and here is not None and not wrong:
        grader = with_reference(spec.reinforcement.grader, here, spec.task_definition)
        spec = replace(spec, reinforcement=replace(spec.reinforcement, grader=grader))
        wrong += await asyncio.to_thread(lambda: [*check_rows(grader, here, "reinforcement.grader")])
    wrong += [
        *_check_names(spec),
        *_check_method(spec, training, validation),
        *_check_reinforcement(spec, base, settings),
        *_check_tuning(spec, base, settings),
        *_check_served_as(spec, base, settings),
        *_check_hyperparameters(spec.hyperparameters, base, validation),
        *check_sharding(spec),
        *_check_data(training, validation),
        *check_start(spec, base, start),
        *check_sweep(spec, _highest_rank(base, settings), loads_as_it_is(spec)),
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
        spec = replace(spec, lora=replace(spec.lora, target_modules=()))
    return replace(spec, from_adapter=start.model) if start else spec


def loads_as_it_is(spec: JobSpec) -> bool:
    """Whether the engine loads what is trained as the adapter that it is."""
    return spec.tuning is Tuning.LORA and not spec.lora.use_dora and not spec.lora.modules_to_save


async def _start(
    store: Store, project: str, spec: JobSpec, wrong: list[FieldViolation], missing: list[FieldViolation]
) -> AdapterVersion | None:
    """The version that training goes on from."""
    name = start_name(spec, wrong)
    if name is None or name.adapter is None:
        return None
    found = store.resolve_version(project, name.base, name.adapter, version=name.version, alias=name.alias)
    return await _found(found, "from_adapter", missing)


async def _found(lookup: Awaitable[T], field: str, missing: list[FieldViolation]) -> T | None:
    try:
        return await lookup
    except NotFound as error:
        missing.append(FieldViolation(field, error.message))
        return None


def _check_names(spec: JobSpec) -> Iterator[FieldViolation]:
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


def _check_method(spec: JobSpec, training: Dataset | None, validation: Dataset | None) -> Iterator[FieldViolation]:
    method = spec.method or Method.SUPERVISED
    has_task = bool(spec.task or spec.task_definition)
    if has_task and method not in WITH_TASK:
        yield FieldViolation("task", f"has a prompt and a completion, which {method} does not learn from")
    fitting = FORMATS_OF_METHOD[method] | ({"fields"} if has_task and method in WITH_TASK else set())
    for field, dataset in (("training_dataset", training), ("validation_dataset", validation)):
        if dataset is None or dataset.format.value in fitting:
            continue
        if dataset.format.value == "fields":
            yield FieldViolation(field, "has rows of named fields, which need a task's template: name a task")
            continue
        usual = METHOD_OF_FORMAT.get(dataset.format.value, Method.SUPERVISED)
        yield FieldViolation(
            field,
            f"has {dataset.format} rows, from which {method} cannot learn (it takes {', '.join(sorted(fitting))}); "
            f"use the method {usual}, or other data",
        )
    if spec.preference.beta < 0 or not math.isfinite(spec.preference.beta):
        yield FieldViolation("preference.beta", f"{spec.preference.beta} is not positive; leave it out for 0.1")


def _check_reinforcement(spec: JobSpec, base: BaseModel | None, settings: Settings) -> Iterator[FieldViolation]:
    if spec.method is not Method.REINFORCEMENT:
        return
    asked = spec.reinforcement
    if asked.grader is None:
        yield FieldViolation("reinforcement.grader", "is required: it turns an answer into a reward")
    else:
        yield from check_grader(asked.grader, "reinforcement.grader")
    if asked.group_size and not 2 <= asked.group_size <= 256:
        yield FieldViolation(
            "reinforcement.group_size", f"{asked.group_size} is outside [2, 256]: answers are compared with each other"
        )
    if asked.max_completion_tokens < 0:
        yield FieldViolation(
            "reinforcement.max_completion_tokens",
            f"must not be negative; leave it out for {DEFAULT_COMPLETION_TOKENS}",
        )
    yield from _check_sampling(spec, base, settings)
    for name, value, most in (
        ("temperature", asked.temperature, 2.0),
        ("beta", asked.beta, 10.0),
        ("epsilon", asked.epsilon, 1.0),
    ):
        if not 0 <= value <= most:
            yield FieldViolation(f"reinforcement.{name}", f"{value} is outside [0, {most:g}]")


def _check_sampling(spec: JobSpec, base: BaseModel | None, settings: Settings) -> Iterator[FieldViolation]:
    """What follows from sampling the policy, as it trains, from the inference service."""
    if not loads_as_it_is(spec):
        tuned = spec.tuning is not Tuning.LORA
        field = "tuning" if tuned else "lora.use_dora" if spec.lora.use_dora else "lora.modules_to_save"
        yield FieldViolation(
            field,
            "reinforcement samples the policy from the inference service after each update, and what this trains "
            "cannot be loaded there as it is; use plain LoRA",
        )
    asked = spec.hyperparameters
    longest = min(settings.serving.context_tokens, base.context_tokens if base else settings.serving.context_tokens)
    if asked.context_tokens is not None and asked.context_tokens > longest:
        yield FieldViolation(
            "hyperparameters.context_tokens",
            f"{asked.context_tokens} is more than the {longest} tokens that the inference service samples within "
            "(GRAFT_SERVING_CONTEXT_TOKENS)",
        )
    context_tokens = asked.context_tokens or longest
    if (answer_tokens := spec.reinforcement.max_completion_tokens or DEFAULT_COMPLETION_TOKENS) >= context_tokens:
        yield FieldViolation(
            "reinforcement.max_completion_tokens",
            f"{answer_tokens} leaves no room for a prompt in a context of {context_tokens}",
        )
    for field, given in (
        ("validation_dataset", spec.validation_dataset),
        ("hyperparameters.validation_fraction", asked.validation_fraction),
    ):
        if given is not None:
            yield FieldViolation(
                field,
                "reinforcement has no held-out loss: each step's reward is of answers that the policy has not learned "
                "from yet; evaluate the result on other prompts instead",
            )


def _check_tuning(spec: JobSpec, base: BaseModel | None, settings: Settings) -> Iterator[FieldViolation]:
    if spec.tuning is Tuning.LORA:
        yield from _check_lora(spec.lora, base, settings)
    elif spec.tuning is Tuning.LAST_LAYERS:
        yield from _check_last_layers(spec.last_layers, base)


def _check_last_layers(asked: LastLayers, base: BaseModel | None) -> Iterator[FieldViolation]:
    if asked.blocks < 0:
        yield FieldViolation("last_layers.blocks", f"must not be negative; leave it out for {DEFAULT_BLOCKS}")
    elif base and base.shape and (blocks := asked.blocks or DEFAULT_BLOCKS) > base.shape.blocks:
        yield FieldViolation(
            "last_layers.blocks",
            f"{blocks} are asked for, and {base.id} has {base.shape.blocks}; use 1 to {base.shape.blocks}, or tune "
            "full, which changes the embeddings as well",
        )


def _check_served_as(spec: JobSpec, base: BaseModel | None, settings: Settings) -> Iterator[FieldViolation]:
    if spec.served_as is ServedAs.ADAPTER and not loads_as_it_is(spec):
        what = spec.tuning if spec.tuning is not Tuning.LORA else "DoRA" if spec.lora.use_dora else "modules_to_save"
        yield FieldViolation(
            "served_as",
            f"the inference service cannot load what {what} trains as the adapter that it is; use low_rank_delta, "
            "or merged_model",
        )
    if spec.served_as is not ServedAs.ADAPTER and loads_as_it_is(spec):
        yield FieldViolation("served_as", f"a LoRA adapter is served as it is; {spec.served_as} would only lose some")
    highest = _highest_rank(base, settings)
    if spec.delta_rank and not 1 <= spec.delta_rank <= highest:
        yield FieldViolation("delta_rank", f"{spec.delta_rank} cannot be loaded: use 1 to {highest}, or leave it out")


def _highest_rank(base: BaseModel | None, settings: Settings) -> int:
    # The catalogue may promise more than the engine was started with; what cannot be served is not trained.
    return min(settings.serving.max_lora_rank, base.max_lora_rank if base else settings.serving.max_lora_rank)


def _check_lora(lora: Lora, base: BaseModel | None, settings: Settings) -> Iterator[FieldViolation]:
    highest = _highest_rank(base, settings)
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
    if lora.base_quantization and not settings.training.quantized_base:
        yield FieldViolation(
            "lora.base_quantization",
            "needs a GPU and bitsandbytes on every training node, and this installation does not say that it has them "
            "(GRAFT_TRAINING_QUANTIZED_BASE)",
        )
    if lora.base_quantization and (lora.use_dora or lora.modules_to_save):
        yield FieldViolation(
            "lora.base_quantization",
            "rounds the base, and what use_dora or modules_to_save trains is served as a change of the base as it is; "
            "leave one of them out",
        )
    for name in ("modules_to_save", "target_modules"):
        if (count := len(getattr(lora, name))) > MAX_MODULES:
            yield FieldViolation(f"lora.{name}", f"names {count} modules; {MAX_MODULES} are allowed")
            return
    for index, module in enumerate(lora.modules_to_save):
        if module != HEAD:
            yield FieldViolation(f"lora.modules_to_save[{index}]", f"{module!r} cannot be saved whole; use {HEAD!r}")
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


def _check_hyperparameters(
    asked: Hyperparameters, base: BaseModel | None, validation: Dataset | None
) -> Iterator[FieldViolation]:
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
    if asked.validation_fraction is not None and validation is not None:
        yield FieldViolation(
            "hyperparameters.validation_fraction", "holds rows out, and validation_dataset is given; give one of them"
        )
    if asked.early_stopping_patience and validation is None and asked.validation_fraction is None:
        yield FieldViolation(
            "hyperparameters.early_stopping_patience",
            "watches the held-out loss: give a validation_dataset or a validation_fraction",
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
