"""Domain types to protobuf and back, for the gRPC edge. The only module that knows both."""

from collections.abc import Iterable
from dataclasses import asdict
from datetime import datetime
from typing import Any, cast

from google.protobuf.duration_pb2 import Duration
from google.protobuf.struct_pb2 import Struct, Value
from google.protobuf.timestamp_pb2 import Timestamp

from graft.api.v1 import adapter_pb2, base_model_pb2, dataset_pb2, dataset_report_pb2, fine_tuning_job_pb2
from graft.domain.errors import KINDS, FieldViolation, GraftError, Internal, InvalidArgument
from graft.domain.jobs import (
    Checkpoint,
    Event,
    Hyperparameters,
    Job,
    JobError,
    JobSpec,
    Lora,
    OverLengthPolicy,
    Progress,
    Resolved,
)
from graft.domain.names import dataset_name, job_name, parse_resource, resource
from graft.domain.reports import DatasetReport
from graft.domain.resources import Adapter, AdapterVersion, BaseModel, Dataset, DatasetFormat
from graft.internal.status import to_status
from graft.internal.v1 import engine_pb2

_FORMATS = {format: dataset_pb2.DatasetFormat.Value(f"DATASET_FORMAT_{format.name}") for format in DatasetFormat}
_DECLARED: dict[int, DatasetFormat] = {number: format for format, number in _FORMATS.items()}
_POLICIES: dict[int, OverLengthPolicy] = {
    fine_tuning_job_pb2.OVER_LENGTH_POLICY_UNSPECIFIED: OverLengthPolicy.DROP,
    fine_tuning_job_pb2.OVER_LENGTH_POLICY_DROP: OverLengthPolicy.DROP,
    fine_tuning_job_pb2.OVER_LENGTH_POLICY_TRUNCATE: OverLengthPolicy.TRUNCATE,
    fine_tuning_job_pb2.OVER_LENGTH_POLICY_FAIL: OverLengthPolicy.FAIL,
}
_POLICY_NUMBERS = {
    OverLengthPolicy.DROP: fine_tuning_job_pb2.OVER_LENGTH_POLICY_DROP,
    OverLengthPolicy.TRUNCATE: fine_tuning_job_pb2.OVER_LENGTH_POLICY_TRUNCATE,
    OverLengthPolicy.FAIL: fine_tuning_job_pb2.OVER_LENGTH_POLICY_FAIL,
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
)


def timestamp(time: datetime | None) -> Timestamp | None:
    """None stays None, which leaves a message field unset."""
    if time is None:
        return None
    made = Timestamp()
    made.FromDatetime(time)
    return made


# Data sets and base models


def dataset(found: Dataset) -> dataset_pb2.Dataset:
    """A data set without where it lies."""
    return dataset_pb2.Dataset(
        name=dataset_name(found.project, found.id),
        display_name=found.display_name,
        format=_FORMATS[found.format],
        row_count=found.row_count,
        size_bytes=found.size_bytes,
        digest=found.digest,
        create_time=timestamp(found.create_time),
    )


def dataset_report(found: DatasetReport) -> dataset_report_pb2.DatasetReport:
    """What a check found: the same fields."""
    return dataset_report_pb2.DatasetReport(**{**asdict(found), "format": _FORMATS[DatasetFormat(found.format)]})


def declared_format(number: int) -> DatasetFormat | None:
    """The format that an upload declares; None when it is to be recognised. Raises InvalidArgument."""
    if number == dataset_pb2.DATASET_FORMAT_UNSPECIFIED:
        return None
    if number not in _DECLARED:
        field = "header.format"
        raise InvalidArgument(
            f"{field}: {number} is not a format that this version knows; it knows {', '.join(DatasetFormat)}.",
            reason="INVALID_FORMAT",
            violations=(FieldViolation(field, f"{number} is not a format"),),
        )
    return _DECLARED[number]


def base_model(project: str, found: BaseModel) -> base_model_pb2.BaseModel:
    """A base model as the project sees it, without where it lies."""
    return base_model_pb2.BaseModel(
        name=resource("projects", project, "baseModels", found.id),
        model=found.id,
        digest=found.digest,
        parameter_count=found.parameter_count,
        size_bytes=found.size_bytes,
        context_tokens=found.context_tokens,
        license=found.license,
        target_modules=found.target_modules,
        max_lora_rank=found.max_lora_rank,
        source=found.source,
    )


# Jobs


def job_spec(project: str, asked: fine_tuning_job_pb2.FineTuningJob) -> JobSpec:
    """What a client asked for; output-only fields are ignored (AIP-203). Raises InvalidArgument naming a bad field."""
    asked_for = asked.hyperparameters
    return JobSpec(
        base_model=_base_id(asked.base_model),
        training_dataset=dataset_id(project, asked.training_dataset, "training_dataset"),
        validation_dataset=dataset_id(project, asked.validation_dataset, "validation_dataset")
        if asked.validation_dataset
        else None,
        suffix=asked.suffix or None,
        lora=Lora(
            rank=asked.lora.rank,
            alpha=asked.lora.alpha,
            dropout=asked.lora.dropout,
            target_modules=tuple(asked.lora.target_modules),
        ),
        hyperparameters=Hyperparameters(
            # ListFields tells set from unset, also for a value of zero.
            **{field.name: value for field, value in asked_for.ListFields() if field.name in _OPTIONAL_HYPERPARAMETERS},
            over_length_policy=_policy(asked_for.over_length_policy),
        ),
        metadata=dict(asked.metadata),
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
    owner, found = parse_resource(name, "projects", "datasets", field=field)
    if owner != project:
        description = f"{name!r} belongs to another project; upload it to {project!r}"
        raise InvalidArgument(
            f"{field}: {description}", reason="WRONG_PROJECT", violations=(FieldViolation(field, description),)
        )
    return found


def _policy(number: int) -> OverLengthPolicy:
    if number not in _POLICIES:
        field = "hyperparameters.over_length_policy"
        raise InvalidArgument(
            f"{field}: {number} is not a policy that this version knows; use DROP, TRUNCATE or FAIL.",
            reason="INVALID_JOB",
            violations=(FieldViolation(field, f"{number} is not a policy"),),
        )
    return _POLICIES[number]


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
        supervised=fine_tuning_job_pb2.SupervisedMethod(),
        lora=fine_tuning_job_pb2.LoraTuning(
            rank=spec.lora.rank,
            alpha=spec.lora.alpha,
            dropout=spec.lora.dropout,
            target_modules=spec.lora.target_modules,
        ),
        hyperparameters=fine_tuning_job_pb2.Hyperparameters(
            **{name: getattr(asked, name) for name in _OPTIONAL_HYPERPARAMETERS},
            over_length_policy=_POLICY_NUMBERS[asked.over_length_policy],
        ),
        metadata=spec.metadata,
        state=fine_tuning_job_pb2.FineTuningJob.State.Value(f"STATE_{found.state.value}"),
        error=to_status(_error(found.error)) if found.error else None,
        create_time=timestamp(found.create_time),
        start_time=timestamp(found.start_time),
        end_time=timestamp(found.end_time),
        update_time=timestamp(found.update_time),
        fine_tuned_model=found.fine_tuned_model or "",
        attempt=found.attempt,
        resolved_hyperparameters=[_resolved(one) for one in found.resolved],
        progress=_progress(found.progress) if found.progress else None,
        metrics=found.metrics,
        cancel_requested=found.cancel_requested,
    )


def _error(error: JobError) -> GraftError:
    return KINDS.get(error.code, Internal)(error.message, reason=error.reason)


def _resolved(one: Resolved) -> fine_tuning_job_pb2.ResolvedHyperparameter:
    value = Value()
    if isinstance(one.value, list):
        value.list_value.extend(one.value)
    elif isinstance(one.value, str):
        value.string_value = one.value
    else:
        value.number_value = one.value
    return fine_tuning_job_pb2.ResolvedHyperparameter(
        name=one.name, value=value, derived=one.derived, reason=one.reason
    )


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


# Adapters


def adapter(found: Adapter) -> adapter_pb2.Adapter:
    """An adapter with its aliases."""
    return adapter_pb2.Adapter(
        name=resource("projects", found.project, "baseModels", found.base_model, "adapters", found.adapter),
        model=f"{found.base_model}:{found.adapter}",
        aliases=found.aliases,
        newest_version=found.newest_version,
        create_time=timestamp(found.create_time),
    )


def version(found: AdapterVersion, aliases: dict[str, int]) -> adapter_pb2.AdapterVersion:
    """A version; `aliases` are the adapter's, of which those that point here are told."""
    line = ("projects", found.project, "baseModels", found.base_model, "adapters", found.adapter)
    return adapter_pb2.AdapterVersion(
        name=resource(*line, "versions", str(found.version)),
        model=found.model,
        version=found.version,
        digest=found.digest,
        base_model_digest=found.base_model_digest,
        dataset_digest=found.dataset_digest,
        fine_tuning_job=job_name(found.project, found.job_id) if found.job_id else "",
        rank=found.rank,
        size_bytes=found.size_bytes,
        aliases=sorted(alias for alias, number in aliases.items() if number == found.version),
        metrics=found.metrics,
        create_time=timestamp(found.create_time),
        mlflow_run_id=found.mlflow_run_id,
    )


def replicas(found: Iterable[engine_pb2.Replica]) -> list[adapter_pb2.ReplicaResidency]:
    """The internal answer as the public one."""
    tier = adapter_pb2.ResidentAdapter
    return [
        adapter_pb2.ReplicaResidency(
            replica=replica.replica,
            base_model=replica.base_model,
            capacity=replica.capacity,
            adapters=[
                adapter_pb2.ResidentAdapter(
                    model=resident.model,
                    digest=resident.digest,
                    tier=tier.TIER_ENGINE if resident.in_engine else tier.TIER_DISK,
                    active_requests=resident.active_requests,
                    last_use_time=resident.last_use_time if resident.HasField("last_use_time") else None,
                )
                for resident in replica.adapters
            ],
            ready=replica.ready,
            engine_restarts=replica.engine_restarts,
        )
        for replica in found
    ]
