"""The tables. Owns their shape; `convert.py` maps rows to domain types, `migrations/` brings a database here.

Times are UTC microseconds in BIGINT: the same on SQLite, which has no time type, and PostgreSQL, and exact to compare.
"""

from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    TypeDecorator,
    UniqueConstraint,
)

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def to_micros(value: datetime) -> int:
    """Microseconds since 1970 of a timezone-aware time."""
    return (value - EPOCH) // timedelta(microseconds=1)


class UtcTime(TypeDecorator[datetime]):
    """A timezone-aware UTC time, stored as microseconds since 1970."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> int | None:  # noqa: ARG002
        return None if value is None else to_micros(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        return None if value is None else EPOCH + timedelta(microseconds=value)


metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
    }
)

datasets = Table(
    "datasets",
    metadata,
    Column("id", String(63), primary_key=True),
    Column("project", String(63), nullable=False),
    Column("display_name", String, nullable=False),
    Column("format", String(32), nullable=False),
    Column("row_count", BigInteger, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("digest", String(80), nullable=False),
    Column("uri", String, nullable=False),
    Column("create_time", UtcTime, nullable=False),
    Column("labels", JSON(none_as_null=True)),
    Column("request_id", String),
    UniqueConstraint("project", "request_id"),
    Index(None, "project", "create_time", "id"),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(63), primary_key=True),
    Column("project", String(63), nullable=False),
    Column("spec", JSON, nullable=False),
    # Copies of two fields of `spec`, so that a data set in use is found by index.
    Column("training_dataset", String(63), nullable=False, index=True),
    Column("validation_dataset", String(63), index=True),
    Column("state", String(16), nullable=False),
    Column("create_time", UtcTime, nullable=False),
    Column("update_time", UtcTime, nullable=False),
    Column("start_time", UtcTime),
    Column("end_time", UtcTime),
    Column("attempt", Integer, nullable=False),
    Column("fine_tuned_model", String),
    Column("error", JSON(none_as_null=True)),
    Column("memory", JSON(none_as_null=True)),
    Column("resolved", JSON, nullable=False),
    Column("progress", JSON(none_as_null=True)),
    Column("metrics", JSON, nullable=False),
    Column("cancel_requested", Boolean, nullable=False),
    Column("pause_requested", Boolean, nullable=False),
    Column("mlflow_run_id", String),
    Column("lease_owner", String),
    Column("lease_expire_time", UtcTime),
    Column("last_sequence", BigInteger, nullable=False),
    Column("request_id", String),
    UniqueConstraint("project", "request_id"),
    Index(None, "project", "create_time", "id"),
    Index(None, "state", "create_time"),
    Index(None, "lease_owner"),
)

events = Table(
    "events",
    metadata,
    Column("project", String(63), nullable=False),
    Column("job_id", ForeignKey("jobs.id"), primary_key=True),
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("create_time", UtcTime, nullable=False),
    Column("level", String(8), nullable=False),
    Column("type", String(32), nullable=False),
    Column("message", String, nullable=False),
    Column("data", JSON, nullable=False),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("project", String(63), nullable=False),
    Column("job_id", ForeignKey("jobs.id"), primary_key=True),
    Column("attempt", Integer, primary_key=True, autoincrement=False),
    Column("step", Integer, primary_key=True, autoincrement=False),
    Column("create_time", UtcTime, nullable=False),
    Column("uri", String, nullable=False),
    Column("metrics", JSON, nullable=False),
)

base_models = Table(
    "base_models",
    metadata,
    Column("id", String(63), primary_key=True),
    Column("path", String, nullable=False),
    Column("digest", String(80), nullable=False),
    Column("parameter_count", BigInteger, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("context_tokens", Integer, nullable=False),
    Column("license", String, nullable=False),
    Column("source", String, nullable=False),
    Column("target_modules", JSON, nullable=False),
    Column("max_lora_rank", Integer, nullable=False),
    Column("project", String(63), nullable=False, server_default=""),
    Column("shape", JSON(none_as_null=True)),
)

adapters = Table(
    "adapters",
    metadata,
    Column("project", String(63), primary_key=True),
    Column("base_model", String(63), primary_key=True),
    Column("adapter", String(63), primary_key=True),
    Column("aliases", JSON, nullable=False),
    Column("newest_version", Integer, nullable=False),
    Column("create_time", UtcTime, nullable=False),
)

adapter_versions = Table(
    "adapter_versions",
    metadata,
    Column("project", String(63), primary_key=True),
    Column("base_model", String(63), primary_key=True),
    Column("adapter", String(63), primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("digest", String(80), nullable=False),
    Column("base_model_digest", String(80), nullable=False),
    Column("dataset_digest", String(80), nullable=False),
    Column("job_id", String(63), nullable=False),
    Column("rank", Integer, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("mlflow_run_id", String, nullable=False),
    Column("create_time", UtcTime, nullable=False),
    Column("metrics", JSON, nullable=False),
    Column("task_definition", String, nullable=False),
    Column("served_as", String(32), nullable=False, server_default="adapter"),
)

evaluations = Table(
    "evaluations",
    metadata,
    Column("id", String(63), primary_key=True),
    Column("project", String(63), nullable=False),
    Column("spec", JSON, nullable=False),
    Column("state", String(16), nullable=False),
    Column("create_time", UtcTime, nullable=False),
    Column("update_time", UtcTime, nullable=False),
    Column("start_time", UtcTime),
    Column("end_time", UtcTime),
    Column("error", JSON(none_as_null=True)),
    Column("answered_requests", Integer, nullable=False),
    Column("total_requests", Integer, nullable=False),
    Column("results", JSON, nullable=False),
    Column("verdicts", JSON, nullable=False),
    Column("mlflow_run_id", String),
    Column("cancel_requested", Boolean, nullable=False),
    Column("lease_owner", String),
    Column("lease_expire_time", UtcTime),
    Column("request_id", String),
    UniqueConstraint("project", "request_id"),
    Index(None, "project", "create_time", "id"),
    Index(None, "state", "create_time"),
)

alias_wishes = Table(
    "alias_wishes",
    metadata,
    Column("id", String(63), primary_key=True),
    Column("project", String(63), nullable=False),
    Column("base_model", String(63), nullable=False),
    Column("adapter", String(63), nullable=False),
    Column("alias", String(63), nullable=False),
    Column("version", Integer, nullable=False),
    Column("done", Boolean, nullable=False, index=True),
    Column("error", JSON(none_as_null=True)),
    Column("create_time", UtcTime, nullable=False),
)

dataset_checks = Table(
    "dataset_checks",
    metadata,
    Column("id", String(80), primary_key=True),
    Column("project", String(63), nullable=False),
    Column("dataset_id", String(63), nullable=False),
    Column("base_model", String(63), nullable=False),
    Column("held_out_id", String(63)),
    Column("context_tokens", Integer),
    Column("epochs", Float, nullable=False),
    Column("task_definition", String, nullable=False, server_default=""),
    Column("done", Boolean, nullable=False, index=True),
    Column("report", JSON(none_as_null=True)),
    Column("error", JSON(none_as_null=True)),
    Column("create_time", UtcTime, nullable=False),
)

deployments = Table(
    "deployments",
    metadata,
    # Base models are shared by all projects, so their ids are unique without one.
    Column("base_model", String(63), primary_key=True),
    Column("project", String(63), nullable=False),
    Column("source", String, nullable=False),
    Column("create_time", UtcTime, nullable=False),
    Column("state", String(16), nullable=False),
    Column("error", JSON(none_as_null=True)),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("key_hash", String(64), primary_key=True),
    Column("project", String(63), nullable=False),
    Column("label", String, nullable=False),
    Column("create_time", UtcTime, nullable=False),
)

leads = Table(
    "leads",
    metadata,
    # One row, the orchestrators', which the migration has made.
    Column("name", String(63), primary_key=True),
    Column("owner", String, nullable=False),
    Column("expire_time", UtcTime, nullable=False),
)

schema_readers = Table(
    "schema_readers",
    metadata,
    # One row: the oldest revision whose Graft can use the database. Written by migrations alone.
    Column("oldest", String, primary_key=True),
)
