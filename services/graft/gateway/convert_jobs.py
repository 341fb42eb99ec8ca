"""Jobs as protobuf and back, for the gRPC edge. Data sets, base models and adapters are `graft.gateway.convert`'s."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, TypeVar, cast

from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct, Value

from graft.api.v1 import fine_tuning_job_pb2
from graft.domain.errors import FieldViolation, InvalidArgument
from graft.domain.grading import GraderSpec
from graft.domain.jobs import (
    Checkpoint,
    Event,
    Hyperparameters,
    Job,
    JobSpec,
    LastLayers,
    Lora,
    LossOn,
    Memory,
    Method,
    OverLengthPolicy,
    Preference,
    Progress,
    Reinforcement,
    Resolved,
    ServedAs,
    Sharding,
    Sweep,
    Tuning,
)
from graft.domain.names import dataset_name, job_name, parse_resource
from graft.gateway.convert import status, timestamp

T = TypeVar("T")

_POLICIES: dict[int, OverLengthPolicy] = {
    fine_tuning_job_pb2.OVER_LENGTH_POLICY_UNSPECIFIED: OverLengthPolicy.DROP,
    fine_tuning_job_pb2.OVER_LENGTH_POLICY_DROP: OverLengthPolicy.DROP,
    fine_tuning_job_pb2.OVER_LENGTH_POLICY_TRUNCATE: OverLengthPolicy.TRUNCATE,
    fine_tuning_job_pb2.OVER_LENGTH_POLICY_FAIL: OverLengthPolicy.FAIL,
}
_SHARDINGS: dict[int, Sharding] = {
    fine_tuning_job_pb2.SHARDING_UNSPECIFIED: Sharding.AUTO,
    fine_tuning_job_pb2.SHARDING_AUTO: Sharding.AUTO,
    fine_tuning_job_pb2.SHARDING_ALWAYS: Sharding.ALWAYS,
    fine_tuning_job_pb2.SHARDING_NEVER: Sharding.NEVER,
}
_LOSS_ON: dict[int, LossOn] = {
    fine_tuning_job_pb2.LOSS_ON_UNSPECIFIED: LossOn.COMPLETION,
    fine_tuning_job_pb2.LOSS_ON_COMPLETION: LossOn.COMPLETION,
    fine_tuning_job_pb2.LOSS_ON_ALL: LossOn.ALL,
}
_SERVED_AS: dict[int, ServedAs | None] = {
    fine_tuning_job_pb2.SERVED_AS_UNSPECIFIED: None,
    fine_tuning_job_pb2.SERVED_AS_ADAPTER: ServedAs.ADAPTER,
    fine_tuning_job_pb2.SERVED_AS_LOW_RANK_DELTA: ServedAs.LOW_RANK_DELTA,
    fine_tuning_job_pb2.SERVED_AS_MERGED_MODEL: ServedAs.MERGED_MODEL,
}
_QUANTIZATIONS: dict[int, str] = {
    fine_tuning_job_pb2.BASE_QUANTIZATION_UNSPECIFIED: "",
    fine_tuning_job_pb2.BASE_QUANTIZATION_NF4: "nf4",
}
_OPTIONAL_HYPERPARAMETERS = (
    "epochs",
    "max_steps",
    "batch_size",
    "learning_rate",
    "learning_rate_multiplier",
    "warmup_ratio",
    "weight_decay",
    "max_grad_norm",
    "context_tokens",
    "seed",
    "num_workers",
    "checkpoint_steps",
    "validation_fraction",
    "early_stopping_patience",
    "eval_steps",
)


def job_spec(project: str, asked: fine_tuning_job_pb2.FineTuningJob) -> JobSpec:
    """What a client asked for; output-only fields are ignored (AIP-203). Raises InvalidArgument naming a bad field."""
    asked_for = asked.hyperparameters
    method = asked.WhichOneof("method")
    return JobSpec(
        base_model=_base_id(asked.base_model),
        training_dataset=dataset_id(project, asked.training_dataset, "training_dataset"),
        validation_dataset=dataset_id(project, asked.validation_dataset, "validation_dataset")
        if asked.validation_dataset
        else None,
        suffix=asked.suffix or None,
        method=Method(method) if method else None,
        loss_on=_known(_LOSS_ON, asked.supervised.loss_on, "supervised.loss_on"),
        preference=Preference(beta=asked.preference.beta),
        reinforcement=_reinforcement(asked.reinforcement),
        tuning=Tuning(asked.WhichOneof("tuning") or Tuning.LORA),
        lora=_lora(asked.lora),
        last_layers=LastLayers(blocks=asked.last_layers.blocks, train_head=asked.last_layers.train_head),
        served_as=_known(_SERVED_AS, asked.served_as, "served_as"),
        delta_rank=asked.delta_rank,
        task=asked.task,
        task_definition=asked.task_definition,
        from_adapter=asked.from_adapter or None,
        hyperparameters=Hyperparameters(
            # ListFields tells set from unset, also for a value of zero.
            **{field.name: value for field, value in asked_for.ListFields() if field.name in _OPTIONAL_HYPERPARAMETERS},
            over_length_policy=_known(_POLICIES, asked_for.over_length_policy, "hyperparameters.over_length_policy"),
            sharding=_known(_SHARDINGS, asked_for.sharding, "hyperparameters.sharding"),
        ),
        sweep=_sweep(asked.sweep) if asked.HasField("sweep") else None,
        metadata=dict(asked.metadata),
    )


def _sweep(asked: fine_tuning_job_pb2.Sweep) -> Sweep:
    return Sweep(
        learning_rates=tuple(asked.learning_rates),
        ranks=tuple(asked.ranks),
        max_trials=asked.max_trials,
        grace_steps=asked.grace_steps,
        reduction_factor=asked.reduction_factor,
        max_concurrent_trials=asked.max_concurrent_trials,
    )


def _lora(asked: fine_tuning_job_pb2.LoraTuning) -> Lora:
    return Lora(
        rank=asked.rank,
        alpha=asked.alpha,
        dropout=asked.dropout,
        target_modules=tuple(asked.target_modules),
        use_rslora=asked.use_rslora,
        use_dora=asked.use_dora,
        modules_to_save=tuple(asked.modules_to_save),
        base_quantization=_known(_QUANTIZATIONS, asked.base_quantization, "lora.base_quantization"),
    )


def _reinforcement(asked: fine_tuning_job_pb2.ReinforcementMethod) -> Reinforcement:
    grader = None
    if asked.HasField("grader"):
        grader = GraderSpec(asked.grader.kind, MessageToDict(asked.grader.settings))
    return Reinforcement(
        grader=grader,
        group_size=asked.group_size,
        max_completion_tokens=asked.max_completion_tokens,
        temperature=asked.temperature,
        beta=asked.beta,
        epsilon=asked.epsilon,
    )


def _base_id(name: str) -> str:
    if not name:
        raise _required("base_model", "for example 'smollm2-135m'")
    return name


def dataset_id(project: str, name: str, field: str) -> str:
    """The id in a resource name; a bare id is taken as one of the project."""
    if not name:
        raise _required(field, "upload a data set first")
    if "/" not in name:
        return name
    owner, dataset_id = parse_resource(name, "projects", "datasets", field=field)
    if owner != project:
        description = f"{name!r} belongs to another project; upload it to {project!r}"
        raise InvalidArgument(
            f"{field}: {description}", reason="WRONG_PROJECT", violations=(FieldViolation(field, description),)
        )
    return dataset_id


def _known(values: Mapping[int, T], number: int, field: str) -> T:
    """The value of an enum's number. Raises InvalidArgument for one of a later version of the contract."""
    if number not in values:
        kinds = {str(value) for value in values.values() if value}
        raise InvalidArgument(
            f"{field}: {number} is not a value that this version knows; use one of: {', '.join(sorted(kinds))}.",
            reason="INVALID_JOB",
            violations=(FieldViolation(field, f"{number} is not known"),),
        )
    return values[number]


def _required(field: str, hint: str) -> InvalidArgument:
    return InvalidArgument(
        f"{field}: is required; {hint}.", reason="FIELD_REQUIRED", violations=(FieldViolation(field, "is required"),)
    )


def job(found: Job) -> fine_tuning_job_pb2.FineTuningJob:
    """A stored job."""
    spec = found.spec
    asked = spec.hyperparameters
    return fine_tuning_job_pb2.FineTuningJob(
        name=job_name(found.project, found.id),
        base_model=spec.base_model,
        training_dataset=dataset_name(found.project, spec.training_dataset),
        validation_dataset=dataset_name(found.project, spec.validation_dataset) if spec.validation_dataset else "",
        suffix=spec.suffix or "",
        **_method(spec),
        **_tuning(spec),
        served_as=_number(_SERVED_AS, spec.served_as),
        delta_rank=spec.delta_rank,
        task=spec.task,
        task_definition=spec.task_definition,
        from_adapter=spec.from_adapter or "",
        hyperparameters=fine_tuning_job_pb2.Hyperparameters(
            **{name: getattr(asked, name) for name in _OPTIONAL_HYPERPARAMETERS},
            over_length_policy=_number(_POLICIES, asked.over_length_policy),
            sharding=_number(_SHARDINGS, asked.sharding),
        ),
        sweep=None if spec.sweep is None else fine_tuning_job_pb2.Sweep(**asdict(spec.sweep)),
        metadata=spec.metadata,
        state=fine_tuning_job_pb2.FineTuningJob.State.Value(f"STATE_{found.state.value}"),
        error=status(found.error) if found.error else None,
        create_time=timestamp(found.create_time),
        start_time=timestamp(found.start_time),
        end_time=timestamp(found.end_time),
        update_time=timestamp(found.update_time),
        fine_tuned_model=found.fine_tuned_model or "",
        attempt=found.attempt,
        memory_estimate=_memory(found.memory) if found.memory else None,
        resolved_hyperparameters=[_resolved(one) for one in found.resolved],
        progress=_progress(found.progress) if found.progress else None,
        metrics=found.metrics,
        cancel_requested=found.cancel_requested,
    )


def _number(values: Mapping[int, object], value: object) -> Any:
    """The enum's number of a value: the last of those that mean it, since the first is `UNSPECIFIED`."""
    return max(number for number, known in values.items() if known == value)


def _method(spec: JobSpec) -> dict[str, Any]:
    """The one field of the oneof `method`."""
    if spec.method is Method.PREFERENCE:
        return {"preference": fine_tuning_job_pb2.PreferenceMethod(beta=spec.preference.beta)}
    if spec.method is Method.REINFORCEMENT:
        asked = spec.reinforcement
        made = fine_tuning_job_pb2.ReinforcementMethod(
            group_size=asked.group_size,
            max_completion_tokens=asked.max_completion_tokens,
            temperature=asked.temperature,
            beta=asked.beta,
            epsilon=asked.epsilon,
        )
        if asked.grader is not None:
            made.grader.kind = asked.grader.kind
            made.grader.settings.update(asked.grader.settings)
        return {"reinforcement": made}
    if spec.method is Method.SELF_SUPERVISED:
        return {"self_supervised": fine_tuning_job_pb2.SelfSupervisedMethod()}
    if spec.method is Method.INSTRUCTION:
        return {"instruction": fine_tuning_job_pb2.InstructionMethod()}
    return {"supervised": fine_tuning_job_pb2.SupervisedMethod(loss_on=_number(_LOSS_ON, spec.loss_on))}


def _tuning(spec: JobSpec) -> dict[str, Any]:
    """The one field of the oneof `tuning`."""
    if spec.tuning is Tuning.FULL:
        return {"full": fine_tuning_job_pb2.FullTuning()}
    if spec.tuning is Tuning.LAST_LAYERS:
        layers = spec.last_layers
        return {"last_layers": fine_tuning_job_pb2.LastLayersTuning(blocks=layers.blocks, train_head=layers.train_head)}
    lora = spec.lora
    return {
        "lora": fine_tuning_job_pb2.LoraTuning(
            rank=lora.rank,
            alpha=lora.alpha,
            dropout=lora.dropout,
            target_modules=lora.target_modules,
            use_rslora=lora.use_rslora,
            use_dora=lora.use_dora,
            modules_to_save=lora.modules_to_save,
            base_quantization=_number(_QUANTIZATIONS, lora.base_quantization),
        )
    }


def _resolved(one: Resolved) -> fine_tuning_job_pb2.ResolvedHyperparameter:
    value = Value()
    if isinstance(one.value, list):
        value.list_value.extend(cast(list[Any], one.value))
    elif isinstance(one.value, str):
        value.string_value = one.value
    else:
        value.number_value = one.value
    return fine_tuning_job_pb2.ResolvedHyperparameter(
        name=one.name, value=value, derived=one.derived, reason=one.reason
    )


def _memory(found: Memory) -> fine_tuning_job_pb2.MemoryEstimate:
    return fine_tuning_job_pb2.MemoryEstimate(**asdict(found), total_bytes=found.total_bytes)


def _progress(found: Progress) -> fine_tuning_job_pb2.Progress:
    remaining = None
    if found.remaining_seconds is not None:
        remaining = Duration()
        remaining.FromMilliseconds(round(found.remaining_seconds * 1000))
    return fine_tuning_job_pb2.Progress(
        step=found.step,
        total_steps=found.total_steps,
        epoch=found.epoch,
        loss=found.loss,
        tokens_per_second=found.tokens_per_second,
        trained_tokens=found.trained_tokens,
        remaining=remaining,
    )


def event(found: Event) -> fine_tuning_job_pb2.FineTuningJobEvent:
    """An event of a job."""
    data = Struct()
    data.update(cast(dict[str, Any], found.data))
    return fine_tuning_job_pb2.FineTuningJobEvent(
        sequence=found.sequence,
        create_time=timestamp(found.create_time),
        level=fine_tuning_job_pb2.FineTuningJobEvent.Level.Value(f"LEVEL_{found.level.name}"),
        type=found.type,
        message=found.message,
        data=data,
    )


def checkpoint(found: Checkpoint) -> fine_tuning_job_pb2.FineTuningJobCheckpoint:
    """A checkpoint of a job."""
    return fine_tuning_job_pb2.FineTuningJobCheckpoint(
        step=found.step,
        create_time=timestamp(found.create_time),
        metrics=found.metrics,
        uri=found.uri,
        attempt=found.attempt,
    )
