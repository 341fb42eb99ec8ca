"""Rows to domain types and back. The one place that knows both."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from sqlalchemy import RowMapping

from graft.domain.deployments import Deployment, DeploymentState
from graft.domain.grading import GraderSpec
from graft.domain.jobs import (
    Checkpoint,
    Event,
    EventLevel,
    Hyperparameters,
    Job,
    JobError,
    JobSpec,
    JobState,
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
from graft.domain.reports import report_from_json
from graft.domain.resources import Adapter, AdapterVersion, BaseModel, Dataset, DatasetFormat
from graft.domain.shapes import Shape
from graft.store.protocol import AliasWish, DatasetCheck

Row = RowMapping


def spec_to_json(spec: JobSpec) -> dict[str, Any]:
    """JSON of a specification."""
    return asdict(spec)


def spec_from_json(value: Mapping[str, Any]) -> JobSpec:
    """The specification of `spec_to_json`, also of one that was stored before fields were added."""
    hyperparameters = dict(value["hyperparameters"])
    hyperparameters["over_length_policy"] = OverLengthPolicy(hyperparameters["over_length_policy"])
    hyperparameters["sharding"] = Sharding(hyperparameters.get("sharding", Sharding.AUTO))
    lora = dict(value["lora"])
    for name in ("target_modules", "modules_to_save"):
        lora[name] = tuple(lora.get(name, ()))
    reinforcement = dict(value.get("reinforcement", {}))
    if reinforcement.get("grader") is not None:
        reinforcement["grader"] = GraderSpec(**reinforcement["grader"])
    sweep = value.get("sweep")
    if sweep is not None:
        sweep = Sweep(**{**sweep, **{name: tuple(sweep[name]) for name in ("learning_rates", "ranks")}})
    return JobSpec(
        **{
            **value,
            "sweep": sweep,
            "method": Method(value["method"]),
            "loss_on": LossOn(value.get("loss_on", LossOn.COMPLETION)),
            "preference": Preference(**value.get("preference", {})),
            "reinforcement": Reinforcement(**reinforcement),
            "tuning": Tuning(value.get("tuning", Tuning.LORA)),
            "lora": Lora(**lora),
            "last_layers": LastLayers(**value.get("last_layers", {})),
            "served_as": ServedAs(value.get("served_as") or ServedAs.ADAPTER),
            "hyperparameters": Hyperparameters(**hyperparameters),
        }
    )


_JOB_PLAIN = [
    field.name
    for field in fields(Job)
    if field.name not in {"spec", "state", "error", "memory", "resolved", "progress", "metrics"}
]


def job(row: Row) -> Job:
    """A row of `jobs`."""
    return Job(
        **{name: row[name] for name in _JOB_PLAIN},
        spec=spec_from_json(row["spec"]),
        state=JobState(row["state"]),
        error=None if row["error"] is None else JobError(**row["error"]),
        memory=None if row["memory"] is None else Memory(**row["memory"]),
        resolved=tuple(Resolved(**item) for item in row["resolved"]),
        progress=None if row["progress"] is None else Progress(**row["progress"]),
        metrics=dict(row["metrics"]),
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
    values["shape"] = None if row["shape"] is None else Shape(**row["shape"])
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
    return AliasWish(**{**values, "error": None if row["error"] is None else JobError(**row["error"])})


def dataset_check(row: Row) -> DatasetCheck:
    """A row of `dataset_checks`."""
    values = {field.name: row[field.name] for field in fields(DatasetCheck)}
    values["report"] = None if row["report"] is None else report_from_json(row["report"])
    return DatasetCheck(**{**values, "error": None if row["error"] is None else JobError(**row["error"])})


def deployment(row: Row) -> Deployment:
    """A row of `deployments`."""
    values = {field.name: row[field.name] for field in fields(Deployment)}
    error = None if row["error"] is None else JobError(**row["error"])
    return Deployment(**{**values, "state": DeploymentState(row["state"]), "error": error})
