"""Domain types to protobuf and back, for the gRPC edge. The only module that knows both."""

from collections.abc import Collection, Iterable
from datetime import datetime
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from graft.api.v1 import (
    adapter_pb2,
    base_model_pb2,
    dataset_pb2,
    deployment_pb2,
    fine_tuning_job_pb2,
)
from graft.data.tasks.catalog import name_of
from graft.domain.deployments import Deployment
from graft.domain.errors import KINDS, FieldViolation, Internal, InvalidArgument
from graft.domain.jobs import JobError
from graft.domain.names import dataset_name, job_name, resource
from graft.domain.resources import Adapter, AdapterVersion, BaseModel, Dataset, DatasetFormat
from graft.internal.status import to_status
from graft.internal.v1 import engine_pb2

FORMATS = {format: dataset_pb2.DatasetFormat.Value(f"DATASET_FORMAT_{format.name}") for format in DatasetFormat}
_DECLARED: dict[int, DatasetFormat] = {number: format for format, number in FORMATS.items()}


def timestamp(time: datetime | None) -> Timestamp | None:
    """None stays None, which leaves a message field unset."""
    if time is None:
        return None
    made = Timestamp()
    made.FromDatetime(time)
    return made


def status(error: JobError) -> Any:
    """A stored error as `google.rpc.Status`."""
    return to_status(KINDS.get(error.code, Internal)(error.message, reason=error.reason))


# Data sets and base models


def dataset(found: Dataset) -> dataset_pb2.Dataset:
    """A data set without where it lies."""
    return dataset_pb2.Dataset(
        name=dataset_name(found.project, found.id),
        display_name=found.display_name,
        format=FORMATS[found.format],
        row_count=found.row_count,
        size_bytes=found.size_bytes,
        digest=found.digest,
        create_time=timestamp(found.create_time),
    )


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


def base_model(project: str, found: BaseModel, served: Collection[str]) -> base_model_pb2.BaseModel:
    """A base model as the project sees it, without where it lies. `served` are the ids that engines carry."""
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
        served=found.id in served,
    )


def deployment(found: Deployment) -> deployment_pb2.Deployment:
    """A deployment, with the reason when it failed."""
    return deployment_pb2.Deployment(
        name=resource("projects", found.project, "deployments", found.base_model),
        model=found.base_model,
        source=found.source,
        state=deployment_pb2.Deployment.State.Value(f"STATE_{found.state}"),
        error=None if found.error is None else status(found.error),
        create_time=timestamp(found.create_time),
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
        served_as=fine_tuning_job_pb2.ServedAs.Value(f"SERVED_AS_{found.served_as.name}"),
        task=name_of(found.task_definition),
        task_definition=found.task_definition,
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
            memory_bytes=replica.memory_bytes,
        )
        for replica in found
    ]
