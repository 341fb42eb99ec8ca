"""Rows to domain types and back. The one place that knows both."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

from sqlalchemy import RowMapping

from graft.domain.deployments import Deployment, DeploymentState
from graft.domain.evaluations import ContestantResult, Evaluation, EvaluationSpec, EvaluationState
from graft.domain.jobs import (
    Checkpoint,
    Event,
    EventLevel,
    Job,
    JobError,
    JobSpec,
    JobState,
    Memory,
    Progress,
    Resolved,
    ServedAs,
)
from graft.domain.reports import DatasetReport
from graft.domain.resources import Adapter, AdapterVersion, BaseModel, Dataset, DatasetFormat
from graft.domain.shapes import Shape
from graft.domain.stored import from_json
from graft.store.protocol import AliasWish, DatasetCheck

Row = RowMapping
T = TypeVar("T")


def _found(kind: type[T], value: Mapping[str, Any] | None) -> T | None:
    """What a newer Graft has found besides is no loss to this one."""
    return None if value is None else from_json(kind, value)


_JOB_PLAIN = [
    field.name
    for field in fields(Job)
    if field.name not in {"spec", "unknown", "state", "error", "memory", "resolved", "progress", "metrics"}
]


def job(row: Row) -> Job:
    """A row of `jobs`."""
    unknown: list[str] = []
    spec = from_json(JobSpec, row["spec"], unknown)
    return Job(
        **{name: row[name] for name in _JOB_PLAIN},
        spec=replace(spec, served_as=spec.served_as or ServedAs.ADAPTER),
        unknown=tuple(unknown),
        state=JobState(row["state"]),
        error=_found(JobError, row["error"]),
        memory=_found(Memory, row["memory"]),
        resolved=tuple(from_json(Resolved, item) for item in row["resolved"]),
        progress=_found(Progress, row["progress"]),
        metrics=dict(row["metrics"]),
    )


def evaluation(row: Row) -> Evaluation:
    """A row of `evaluations`."""
    unknown: list[str] = []
    spec = from_json(EvaluationSpec, row["spec"], unknown)
    plain = {field.name: row[field.name] for field in fields(Evaluation) if field.name != "unknown"}
    return Evaluation(
        **{
            **plain,
            "spec": spec,
            "unknown": tuple(unknown),
            "state": EvaluationState(row["state"]),
            "error": _found(JobError, row["error"]),
            "results": tuple(from_json(ContestantResult, result) for result in row["results"]),
            "verdicts": tuple(row["verdicts"]),
        }
    )


def dataset(row: Row) -> Dataset:
    """A row of `datasets`."""
    values = {field.name: row[field.name] for field in fields(Dataset)}
    if row["labels"] is not None:
        values["labels"] = {name: tuple(found) for name, found in row["labels"].items()}
    return Dataset(**{**values, "format": DatasetFormat(row["format"])})


def event(row: Row) -> Event:
    """A row of `events`."""
    values = {field.name: row[field.name] for field in fields(Event)}
    return Event(**{**values, "level": EventLevel(row["level"])})


def checkpoint(row: Row) -> Checkpoint:
    """A row of `checkpoints`."""
    return Checkpoint(**{field.name: row[field.name] for field in fields(Checkpoint)})


def base_model(row: Row) -> BaseModel:
    """A row of `base_models`."""
    values = {field.name: row[field.name] for field in fields(BaseModel)}
    values["shape"] = _found(Shape, row["shape"])
    return BaseModel(**{**values, "target_modules": tuple(row["target_modules"])})


def adapter(row: Row) -> Adapter:
    """A row of `adapters`."""
    return Adapter(**{field.name: row[field.name] for field in fields(Adapter)})


def adapter_version(row: Row) -> AdapterVersion:
    """A row of `adapter_versions`."""
    values = {field.name: row[field.name] for field in fields(AdapterVersion)}
    return AdapterVersion(**{**values, "served_as": ServedAs(row["served_as"])})


def alias_wish(row: Row) -> AliasWish:
    """A row of `alias_wishes`."""
    values = {field.name: row[field.name] for field in fields(AliasWish)}
    return AliasWish(**{**values, "error": _found(JobError, row["error"])})


def dataset_check(row: Row) -> DatasetCheck:
    """A row of `dataset_checks`."""
    values = {field.name: row[field.name] for field in fields(DatasetCheck)}
    values["report"] = _found(DatasetReport, row["report"])
    return DatasetCheck(**{**values, "error": _found(JobError, row["error"])})


def deployment(row: Row) -> Deployment:
    """A row of `deployments`."""
    values = {field.name: row[field.name] for field in fields(Deployment)}
    return Deployment(**{**values, "state": DeploymentState(row["state"]), "error": _found(JobError, row["error"])})
