"""The store's promises, on SQLite and on a real PostgreSQL."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, make_url, text

from graft.domain.errors import Aborted, FailedPrecondition, InvalidArgument, NotFound, Unavailable
from graft.domain.jobs import (
    Checkpoint,
    EventLevel,
    Hyperparameters,
    JobError,
    JobSpec,
    JobState,
    Lora,
    OverLengthPolicy,
    Progress,
    Resolved,
)
from graft.domain.resources import Adapter, AdapterVersion, BaseModel, Dataset, DatasetFormat, RegistrySnapshot
from graft.store.protocol import AliasWish, Store
from graft.store.sql import SqlStore, migrate, open_store
from graft.store.tables import metadata
from tests.support.postgres import postgres_server

pytestmark = pytest.mark.integration
LEASE = timedelta(seconds=30)
NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
SPEC = JobSpec(
    base_model="base",
    training_dataset="ds-1",
    validation_dataset="ds-2",
    suffix="reviews",
    lora=Lora(rank=8, target_modules=("q_proj",)),
    hyperparameters=Hyperparameters(epochs=1.5, over_length_policy=OverLengthPolicy.TRUNCATE),
    metadata={"team": "a"},
)


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, str]]:
    with ExitStack() as stack:
        started: dict[str, str] = {}

        class Lazy(dict[str, str]):
            def __missing__(self, kind: str) -> str:
                started[kind] = self[kind] = stack.enter_context(postgres_server())
                return started[kind]

        yield Lazy()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, servers: dict[str, str], tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path / 'graft.db'}"
    server = make_url(servers["postgresql"])
    name = f"t{uuid.uuid4().hex}"
    engine = create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return server.set(database=name).render_as_string(hide_password=False)


@pytest.fixture
async def store(url: str) -> AsyncIterator[SqlStore]:
    await asyncio.to_thread(migrate, url)
    opened = open_store(url)
    yield opened
    await opened.close()


def _dataset(number: int = 1) -> Dataset:
    when = NOW + timedelta(seconds=number)
    return Dataset(
        f"ds-{number}", "default", "a.jsonl", DatasetFormat.MESSAGES, 10, 2**40, "sha256:0", "/x", create_time=when
    )


async def _claimed(store: Store, owner: str = "me") -> tuple[str, object]:
    await store.create_job("default", "ft-1", SPEC, None)
    (job,) = await store.claim_jobs(owner, LEASE, 10)
    return job.id, job


async def test_the_store_is_what_the_protocol_says(store: SqlStore) -> None:
    checked: Store = store
    await checked.ping()
    assert abs((await checked.now()) - datetime.now(UTC)) < timedelta(minutes=1)


async def test_a_job_comes_back_as_it_was_given(store: SqlStore) -> None:
    created = await store.create_job("default", "ft-1", SPEC, None)
    assert created.spec == SPEC
    assert created.state is JobState.VALIDATING
    assert created.create_time.tzinfo is UTC
    assert await store.get_job("default", "ft-1") == created
    (event,) = await store.list_events("default", "ft-1", 0, 10)
    assert (event.sequence, event.type, event.data) == (1, "state", {"state": "VALIDATING"})


async def test_a_retried_create_returns_the_first_job(store: SqlStore) -> None:
    made = await asyncio.gather(*(store.create_job("default", f"ft-{n}", SPEC, "request") for n in range(5)))
    assert len({job.id for job in made}) == 1
    assert len((await store.list_jobs("default", 10, "")).items) == 1
    assert (await store.create_job("other", "ft-9", SPEC, "request")).id == "ft-9"


async def test_a_retried_upload_returns_the_first_data_set(store: SqlStore) -> None:
    made = await asyncio.gather(*(store.create_dataset(_dataset(n), "request") for n in range(5)))
    assert len({dataset.id for dataset in made}) == 1
    assert await store.find_dataset_by_request("default", "request") == made[0]
    assert await store.find_dataset_by_request("default", "unheard") is None


async def test_an_unknown_name_is_told_with_what_exists(store: SqlStore) -> None:
    await store.create_dataset(_dataset(), None)
    await store.create_job("default", "ft-1", SPEC, None)
    with pytest.raises(NotFound, match=r"'nope'.*ds-1"):
        await store.get_dataset("default", "nope")
    with pytest.raises(NotFound, match=r"'nope'.*ft-1"):
        await store.get_job("default", "nope")
    with pytest.raises(NotFound, match="none"):
        await store.get_job("other", "ft-1")
    with pytest.raises(NotFound):
        await store.list_events("default", "nope", 0, 10)


async def test_pages_go_through_everything_once_newest_first_while_rows_are_added(store: SqlStore) -> None:
    for number in range(7):
        await store.create_dataset(_dataset(number), None)
    seen, token = [], ""
    while True:
        page = await store.list_datasets("default", 3, token)
        seen += [dataset.id for dataset in page.items]
        await store.create_dataset(_dataset(100 + len(seen)), None)
        if not (token := page.next_page_token):
            break
    assert seen == [f"ds-{number}" for number in reversed(range(7))]
    for bad in ("garbage", "W10", "!"):
        with pytest.raises(InvalidArgument, match="page_token"):
            await store.list_datasets("default", 3, bad)


async def test_a_data_set_of_a_live_job_is_not_deleted(store: SqlStore) -> None:
    for number in (1, 2, 3):
        await store.create_dataset(_dataset(number), None)
    await store.create_job("default", "ft-1", SPEC, None)
    for used in ("ds-1", "ds-2"):
        with pytest.raises(FailedPrecondition, match="ft-1"):
            await store.delete_dataset("default", used)
    assert (await store.delete_dataset("default", "ds-3")).id == "ds-3"
    (job,) = await store.claim_jobs("me", LEASE, 1)
    await store.transition(job, "me", JobState.FAILED, message="x", error=JobError("INTERNAL", "R", "m"))
    await store.delete_dataset("default", "ds-1")


async def test_two_claimers_never_get_the_same_job(store: SqlStore) -> None:
    for number in range(20):
        await store.create_job("default", f"ft-{number}", SPEC, None)
    rounds = await asyncio.gather(*(store.claim_jobs(f"owner-{n % 4}", LEASE, 3) for n in range(12)))
    claimed = [job.id for jobs in rounds for job in jobs]
    assert len(claimed) == len(set(claimed)) == 20
    held = [await store.leased_jobs(f"owner-{n}") for n in range(4)]
    assert sorted(job.id for jobs in held for job in jobs) == sorted(claimed)


async def test_a_lapsed_lease_is_taken_over_and_the_old_owner_is_refused(store: SqlStore) -> None:
    await store.create_job("default", "ft-1", SPEC, None)
    (mine,) = await store.claim_jobs("old", timedelta(milliseconds=1), 1)
    await asyncio.sleep(0.02)
    (theirs,) = await store.claim_jobs("new", LEASE, 1)
    assert theirs.id == mine.id
    for write in (
        store.transition(mine, "old", JobState.QUEUED, message="x"),
        store.record(mine, "old", metrics={"a": 1.0}),
    ):
        with pytest.raises(Aborted):
            await write
    assert await store.renew_leases("old", LEASE) == frozenset()
    assert await store.renew_leases("new", LEASE) == {"ft-1"}
    assert await store.claim_jobs("other", LEASE, 1) == ()
    await store.release_leases("new")
    assert len(await store.claim_jobs("other", LEASE, 1)) == 1


async def test_a_superseded_attempt_is_refused(store: SqlStore) -> None:
    _, job = await _claimed(store)
    for state in (JobState.QUEUED, JobState.STARTING):
        job = await store.transition(job, "me", state, message="x")
    retried = await store.transition(job, "me", JobState.QUEUED, message="again", next_attempt=True)
    assert retried.attempt == 2
    with pytest.raises(Aborted, match="attempt 1"):
        await store.record(job, "me", metrics={"a": 1.0})


async def test_an_illegal_move_changes_nothing(store: SqlStore) -> None:
    _, job = await _claimed(store)
    with pytest.raises(FailedPrecondition):
        await store.transition(job, "me", JobState.RUNNING, message="x")
    assert (await store.get_job("default", "ft-1")).state is JobState.VALIDATING
    assert len(await store.list_events("default", "ft-1", 0, 10)) == 1


async def test_a_whole_life_is_recorded_in_order_without_gaps(store: SqlStore) -> None:
    _, job = await _claimed(store)
    resolved = (Resolved("epochs", 1.5, False, "given"), Resolved("lora.target_modules", ["q_proj"], True, "all"))
    job = await store.record(job, "me", resolved=resolved, event=(EventLevel.WARN, "message", "long", {"n": 1}))
    for state in (JobState.QUEUED, JobState.STARTING, JobState.RUNNING):
        job = await store.transition(job, "me", state, message=state.value)
    assert job.start_time is not None
    progress = Progress(step=1, total_steps=2, loss=0.5, remaining_seconds=3.0)
    checkpoint = Checkpoint(1, NOW, "/c", 1, {"train_loss": 0.5})
    for _ in range(2):
        job = await store.record(job, "me", progress=progress, metrics={"a": 1.0}, checkpoint=checkpoint)
    job = await store.record(job, "me", metrics={"b": 2.0}, mlflow_run_id="run")
    for state in (JobState.REGISTERING, JobState.EVALUATING):
        job = await store.transition(job, "me", state, message=state.value)
    job = await store.transition(job, "me", JobState.SUCCEEDED, message="done", fine_tuned_model="base:reviews@1")
    assert job.end_time is not None
    assert (job.resolved, job.progress, job.metrics) == (resolved, progress, {"a": 1.0, "b": 2.0})
    assert (job.fine_tuned_model, job.mlflow_run_id, job.lease_owner) == ("base:reviews@1", "run", None)
    assert await store.list_checkpoints("default", "ft-1") == (checkpoint,)
    events = await store.list_events("default", "ft-1", 0, 100)
    assert [event.sequence for event in events] == list(range(1, 9))
    assert [event.data["state"] for event in events if event.type == "state"] == [
        "VALIDATING", "QUEUED", "STARTING", "RUNNING", "REGISTERING", "EVALUATING", "SUCCEEDED",
    ]  # fmt: skip
    assert await store.list_events("default", "ft-1", 6, 1) == events[6:7]
    assert await store.claim_jobs("me", LEASE, 10) == ()


async def test_concurrent_writers_leave_no_gap_in_the_sequence(store: SqlStore) -> None:
    _, job = await _claimed(store)
    writes = (store.record(job, "me", event=(EventLevel.INFO, "message", str(n), {})) for n in range(30))  # type: ignore[arg-type]
    await asyncio.gather(*writes)
    events = await store.list_events("default", "ft-1", 0, 100)
    assert [event.sequence for event in events] == list(range(1, 32))


async def test_a_cancel_is_asked_once_and_refused_after_another_end(store: SqlStore) -> None:
    _, job = await _claimed(store)
    for _ in range(2):
        assert (await store.request_cancel("default", "ft-1")).cancel_requested
    assert len(await store.list_events("default", "ft-1", 0, 10)) == 2
    await store.transition(job, "me", JobState.CANCELLED, message="x")  # type: ignore[arg-type]
    assert (await store.request_cancel("default", "ft-1")).state is JobState.CANCELLED
    await store.create_job("default", "ft-2", SPEC, None)
    (second,) = await store.claim_jobs("me", LEASE, 1)
    await store.transition(second, "me", JobState.FAILED, message="x")
    with pytest.raises(FailedPrecondition, match="FAILED"):
        await store.request_cancel("default", "ft-2")


def _base(name: str) -> BaseModel:
    return BaseModel(name, "/m", "sha256:b", 2**33, 1, 2048, "Apache-2.0", "package", ("q_proj", "v_proj"), 64)


def _version(adapter: str, number: int) -> AdapterVersion:
    return AdapterVersion(
        "default",
        "base",
        adapter,
        number,
        f"sha256:{number}",
        "sha256:b",
        "sha256:d",
        "ft-1",
        8,
        1,
        "run",
        NOW,
        {"m": 1.0},
    )


async def test_names_resolve_from_the_mirror_and_misses_say_what_exists(store: SqlStore) -> None:
    await store.replace_base_models([_base("base"), _base("other")])
    await store.replace_base_models([_base("base")])
    assert await store.list_base_models() == (_base("base"),)
    adapters = tuple(Adapter("default", "base", name, {"champion": 2}, 3, NOW) for name in ("a", "b", "c"))
    versions = tuple(_version("a", number) for number in (1, 2, 3))
    for snapshot in (RegistrySnapshot((), ()), RegistrySnapshot(adapters, versions)):
        await store.replace_registry(snapshot)

    assert await store.resolve_version("default", "base", "a", version=None, alias="champion") == versions[1]
    assert await store.resolve_version("default", "base", "a", version=3, alias=None) == versions[2]
    for arguments, message in [
        (("nope", "a", 1, None), r"base model 'nope'.*base"),
        (("base", "nope", 1, None), r"adapter 'base:nope'.*base:a, base:b"),
        (("base", "a", 9, None), r"adapter version 'base:a@9'.*base:a@3, base:a@2"),
        (("base", "a", None, "nope"), r"alias 'base:a@nope'.*base:a@champion"),
    ]:
        base, adapter, version, alias = arguments
        with pytest.raises(NotFound, match=message):
            await store.resolve_version("default", base, adapter, version=version, alias=alias)  # type: ignore[arg-type]

    first = await store.list_adapters("default", None, 2, "")
    rest = await store.list_adapters("default", "base", 2, first.next_page_token)
    assert first.items + rest.items == adapters
    newest = await store.list_versions("default", "base", "a", 2, "")
    oldest = await store.list_versions("default", "base", "a", 2, newest.next_page_token)
    assert newest.items + oldest.items == versions[::-1]


async def test_an_alias_wish_waits_until_it_is_carried_out(store: SqlStore) -> None:
    wish = AliasWish("w-1", "default", "base", "a", "champion", 2)
    await store.request_alias(wish)
    assert await store.pending_alias_wishes() == (wish,)
    error = JobError("NOT_FOUND", "R", "no such version")
    await store.finish_alias_wish("w-1", error)
    assert await store.pending_alias_wishes() == ()
    assert (await store.get_alias_wish("w-1")).error == error


async def test_a_key_is_found_by_its_hash(store: SqlStore) -> None:
    assert not await store.has_keys()
    await store.add_key("ab", "team", "laptop")
    assert await store.has_keys()
    assert await store.find_key("ab") == "team"
    assert await store.find_key("cd") is None


async def test_the_migrations_lead_to_the_tables_and_may_run_twice_at_once(url: str) -> None:
    await asyncio.gather(*(asyncio.to_thread(migrate, url) for _ in range(3)))
    parsed = make_url(url)
    engine = create_engine(parsed.set(drivername="sqlite") if parsed.get_backend_name() == "sqlite" else parsed)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


async def test_a_database_that_is_gone_is_unavailable_with_a_hint() -> None:
    lost = open_store("postgresql+psycopg://graft@127.0.0.1:1/postgres")
    with pytest.raises(Unavailable, match="GRAFT_STORE_URL"):
        await lost.ping()
    await lost.close()
