"""Rows as a newer Graft writes them, read by this one: what old processes meet in an upgrade and after a rollback."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from alembic.script import ScriptDirectory
from sqlalchemy import JSON, MetaData, inspect, select, text, update

from graft.domain.deployments import Deployment, DeploymentState
from graft.domain.evaluations import (
    Confusion,
    Contestant,
    ContestantResult,
    Difference,
    EvaluationSpec,
    EvaluationState,
    Figure,
)
from graft.domain.grading import GraderSpec
from graft.domain.jobs import (
    Hyperparameters,
    JobError,
    JobSpec,
    JobState,
    Lora,
    Memory,
    Method,
    Preference,
    Progress,
    Reinforcement,
    Resolved,
    Sharding,
    Sweep,
)
from graft.domain.reports import DatasetReport, FoundRows, LabelCount, LengthBin, TrainingEstimate
from graft.domain.resources import BaseModel
from graft.domain.shapes import Shape
from graft.store.protocol import AliasWish, DatasetCheck
from graft.store.sql import SqlStore, _config, migrate
from graft.store.tables import evaluations, jobs, metadata
from tests.support.newer_graft import sync_engine, with_more

pytestmark = pytest.mark.integration
LEASE = timedelta(seconds=30)
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
ERROR = JobError("INTERNAL", "WHY", "Because.")
SPEC = JobSpec(
    "base",
    "ds-1",
    method=Method.REINFORCEMENT,
    preference=Preference(0.2),
    reinforcement=Reinforcement(GraderSpec("numeric", {"field": "answer"}), 4),
    lora=Lora(8, target_modules=("q_proj",)),
    hyperparameters=Hyperparameters(epochs=1.0, sharding=Sharding.ALWAYS),
    sweep=Sweep((1e-4, 1e-3), (4, 8)),
    metadata={"team": "a"},
)
ASKED = EvaluationSpec("ds-1", (Contestant("base", 2),), grader=GraderSpec("numeric", {"field": "answer"}))
FIGURE = Figure("accuracy", 0.5, 0.25, 0.75, 40)
RESULT = ContestantResult(
    "base", "base", 2, (FIGURE,), (Difference("a", FIGURE),), confusion=Confusion(("no",), (1, 2))
)
REPORT = DatasetReport(
    "text", 2, 3, "base", ("x",), "tokens", 1, 2, 3, (LengthBin(0, 1, 2),), FoundRows(1, (1,)), FoundRows(0),
    FoundRows(0), (LabelCount("yes", 2),), estimate=TrainingEstimate(1, 1.0, 2.0, 3.0, "measured"),
)  # fmt: skip
OF_DATACLASSES = {
    *("jobs.spec", "jobs.error", "jobs.memory", "jobs.resolved", "jobs.progress"),
    *("evaluations.spec", "evaluations.error", "evaluations.results"),
    *("dataset_checks.report", "dataset_checks.error", "alias_wishes.error", "deployments.error", "base_models.shape"),
}
OF_ANYTHING = {
    *("jobs.metrics", "checkpoints.metrics", "adapter_versions.metrics", "events.data", "evaluations.verdicts"),
    *("datasets.labels", "base_models.target_modules", "adapters.aliases"),
}
"""Lists, and objects whose names are data: nothing in them can be unknown."""


async def _fill(store: SqlStore) -> dict[str, Callable[[], Awaitable[Any]]]:
    """A row of each kind, and how each is read."""
    job = await store.create_job("default", "ft-1", SPEC, None, Memory(4, 3, 2, 1))
    (job,) = await store.claim_jobs("me", LEASE, 1)
    job = await store.record(job, "me", progress=Progress(step=3), resolved=[Resolved("epochs", 1.0, True, "derived")])
    await store.transition(job, "me", JobState.FAILED, message="x", error=ERROR)
    made = await store.create_evaluation("default", "ev-1", ASKED, None)
    assert await store.claim_evaluation("me", LEASE) is not None
    await store.end_evaluation(made, "me", EvaluationState.FAILED, error=ERROR, results=[RESULT])
    check = DatasetCheck("check", "default", "ds-1", "base", None, None, 1.0)
    await store.request_dataset_check(check)
    await store.finish_dataset_check("check", REPORT, ERROR)
    await store.request_alias(AliasWish("wish", "default", "base", "a", "champion", 1))
    await store.finish_alias_wish("wish", ERROR)
    await store.create_deployment(Deployment("base", "default", "base", NOW))
    await store.move_deployment("base", DeploymentState.FAILED, ERROR)
    shape = Shape(30, 576, 1536, 576, 192, 49152, tied=True)
    await store.replace_base_models([BaseModel("base", "p", "d", 1, 2, 3, "l", "s", ("q_proj",), 64, shape=shape)])
    return {
        "jobs": lambda: store.get_job("default", "ft-1"),
        "evaluations": lambda: store.get_evaluation("default", "ev-1"),
        "dataset_checks": lambda: store.get_dataset_check("check"),
        "alias_wishes": lambda: store.get_alias_wish("wish"),
        "deployments": lambda: store.get_deployment("default", "base"),
        "base_models": lambda: store.get_base_model("base"),
    }


def _grow(url: str, column: str) -> Any:
    """Puts fields of a newer Graft into a column; returns what it held."""
    table = metadata.tables[column.partition(".")[0]]
    held = table.c[column.partition(".")[2]]
    engine = sync_engine(url)
    with engine.begin() as connection:
        before = connection.execute(select(held)).scalar_one()
        assert before, column
        connection.execute(update(table).values({held: with_more(before)}))
    engine.dispose()
    return before


def test_every_json_column_is_known_to_these_tests() -> None:
    found = {f"{t.name}.{c.name}" for t in metadata.tables.values() for c in t.c if isinstance(c.type, JSON)}
    assert found == OF_DATACLASSES | OF_ANYTHING


async def test_rows_with_fields_of_a_newer_graft_are_read(store: SqlStore, url: str) -> None:
    readers = await _fill(store)
    for column in sorted(OF_DATACLASSES):
        read = readers[column.partition(".")[0]]
        before = await read()
        await asyncio.to_thread(_grow, url, column)
        after = await read()
        if column.endswith(".spec"):
            assert after.unknown, column
            after = replace(after, unknown=before.unknown)
        assert after == before, column
    assert [job.id for job in (await store.list_jobs("default", 10, "")).items] == ["ft-1"]
    assert [found.id for found in (await store.list_evaluations("default", 10, "")).items] == ["ev-1"]


async def test_what_a_newer_graft_asks_for_is_named_by_its_path(store: SqlStore, url: str) -> None:
    await _fill(store)
    await asyncio.to_thread(_grow, url, "jobs.spec")
    await asyncio.to_thread(_grow, url, "evaluations.spec")
    job = await store.get_job("default", "ft-1")
    assert {"newer", "hyperparameters.newer", "reinforcement.grader.newer", "sweep.newer"} <= set(job.unknown)
    found = await store.get_evaluation("default", "ev-1")
    assert set(found.unknown) == {"newer", "contestants.newer", "grader.newer"}


async def test_a_value_that_only_a_newer_graft_has_is_named_and_breaks_no_list(store: SqlStore, url: str) -> None:
    await store.create_job("default", "ft-1", SPEC, None)
    engine = sync_engine(url)
    with engine.begin() as connection:
        asked = connection.execute(select(jobs.c.spec)).scalar_one()
        connection.execute(update(jobs).values(spec={**asked, "method": "distillation"}))
    engine.dispose()
    (job,) = (await store.list_jobs("default", 10, "")).items
    assert job.unknown == ("method: distillation",)


async def test_what_nobody_asked_for_is_not_written(store: SqlStore, url: str) -> None:
    # A field that this version has added and the one before does not know concerns only jobs that ask for it.
    await store.create_job("default", "ft-1", JobSpec("base", "ds-1"), None)
    await store.create_evaluation("default", "ev-1", EvaluationSpec("ds-1", (Contestant("base"),)), None)
    engine = sync_engine(url)
    with engine.connect() as connection:
        asked = connection.execute(select(jobs.c.spec)).scalar_one()
        measured = connection.execute(select(evaluations.c.spec)).scalar_one()
    engine.dispose()
    assert "sharding" not in asked["hyperparameters"]
    assert "sweep" not in asked
    assert measured["contestants"] == [{"model": "base"}]


async def test_jobs_and_evaluations_that_were_passed_on_are_claimed_only_to_be_cancelled(store: SqlStore) -> None:
    for number in (1, 2):
        await store.create_job("default", f"ft-{number}", SPEC, None)
        await store.create_evaluation("default", f"ev-{number}", ASKED, None)
    first = await store.claim_jobs("old", LEASE, 1)
    assert [job.id for job in first] == ["ft-1"]
    await store.release_leases("old", "ft-1")
    assert [job.id for job in await store.claim_jobs("old", LEASE, 5, {"ft-1"})] == ["ft-2"]
    await store.request_cancel("default", "ft-1")
    assert [job.id for job in await store.claim_jobs("old", LEASE, 5, {"ft-1"})] == ["ft-1"]
    found = await store.claim_evaluation("old", LEASE, {"ev-1"})
    assert found is not None
    assert found.id == "ev-2"
    assert await store.claim_evaluation("old", LEASE, {"ev-1"}) is None


@dataclass(frozen=True)
class Shown:
    """What a database shows of a table: of each column its type, whether an insert may leave it out, and whether it may
    be NULL; and what must be unique."""

    columns: dict[str, tuple[str, bool, bool]]
    unique: set[tuple[str, ...]]


def _shown(url: str) -> dict[str, Shown]:
    engine, found = sync_engine(url), MetaData()
    found.reflect(engine)
    looking = inspect(engine)
    shown = {
        table.name: Shown(
            {
                column.name: (str(column.type), column.nullable or column.server_default is not None, column.nullable)
                for column in table.c
            },
            {tuple(one["column_names"]) for one in looking.get_unique_constraints(table.name)},
        )
        for table in found.tables.values()
    }
    engine.dispose()
    return shown


def test_migrations_only_add_what_the_graft_before_may_leave_out(url: str) -> None:
    revisions = [one.revision for one in ScriptDirectory.from_config(_config()).walk_revisions()][::-1]
    first = "0009"  # since then the database tells the oldest Graft that can use it
    migrate(url, first)
    for revision in revisions[revisions.index(first) + 1 :]:
        before = _shown(url)
        migrate(url, revision)
        engine = sync_engine(url)
        with engine.connect() as connection:
            oldest = connection.execute(text("SELECT oldest FROM schema_readers")).scalar_one()
        engine.dispose()
        if oldest == revision:  # it says that the Graft before cannot use the database: that one ends at its start
            continue
        after = _shown(url)
        for name, was in before.items():
            now = after[name]
            assert {column: now.columns.get(column) for column in was.columns} == was.columns, f"{revision}: {name}"
            assert now.unique <= was.unique, f"{revision}: {name}"
            demanded = [column for column, told in now.columns.items() if column not in was.columns and not told[1]]
            assert not demanded, f"{revision}: {name}"
