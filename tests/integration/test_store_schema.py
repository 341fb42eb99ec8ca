"""How a database comes to its schema, what happens when it fails, and the command that looks after it."""

import asyncio
import hashlib
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import event, make_url, text

from graft.domain.errors import FailedPrecondition, InvalidArgument, ResourceExhausted, Unavailable
from graft.domain.jobs import JobSpec
from graft.store.database import Database
from graft.store.main import main
from graft.store.sql import SqlStore, check_schema, migrate, open_store, schema_revision
from graft.store.tables import metadata
from tests.support.newer_graft import migrate_as_newer, sync_engine

pytestmark = pytest.mark.integration


async def test_the_migrations_lead_to_the_tables_and_may_run_at_once(url: str) -> None:
    await asyncio.gather(*(asyncio.to_thread(migrate, url) for _ in range(3)))
    engine = sync_engine(url)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


async def test_a_migration_keeps_the_rows_that_are_there(url: str) -> None:
    await asyncio.to_thread(migrate, url, "0001")
    engine = sync_engine(url)
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO jobs (id, project, spec, training_dataset, state, create_time, update_time, attempt,"
                " resolved, metrics, cancel_requested, pause_requested, last_sequence)"
                " VALUES ('ft-1', 'team', '{}', 'ds-1', 'QUEUED', 1, 1, 1, '[]', '{}', FALSE, FALSE, 1)"
            )
        )
        connection.execute(text("INSERT INTO events VALUES ('ft-1', 1, 1, 'info', 'state', 'Job created.', '{}')"))
        connection.execute(text("INSERT INTO checkpoints VALUES ('ft-1', 1, 5, 1, '/c', '{}')"))
    engine.dispose()
    await asyncio.to_thread(migrate, url)
    store = open_store(url)
    try:
        (told,) = await store.list_events("team", "ft-1", 0, 10)
        (kept,) = await store.list_checkpoints("team", "ft-1")
    finally:
        await store.close()
    assert (told.message, kept.step) == ("Job created.", 5)


def test_a_database_that_only_a_newer_graft_can_use_is_refused(url: str) -> None:
    head = migrate_as_newer(url, oldest_reader="9999")
    with pytest.raises(FailedPrecondition, match="newer Graft"):
        migrate(url)
    with pytest.raises(FailedPrecondition, match="newer Graft"):
        check_schema(url)
    assert schema_revision(url) == ("9999", head)


def test_a_process_that_does_not_migrate_says_when_the_database_does_not_fit_it(url: str) -> None:
    migrate(url, "0009")
    with pytest.raises(FailedPrecondition, match="revision 0009") as older:
        check_schema(url)
    assert older.value.reason == "STORE_IS_OLDER"
    migrate(url)
    check_schema(url)
    migrate_as_newer(url)
    check_schema(url)
    with pytest.raises(Unavailable, match="GRAFT_STORE_URL"):
        check_schema("postgresql+psycopg://graft@127.0.0.1:1/postgres")


async def test_a_database_that_a_newer_graft_has_only_added_to_is_used_and_left_as_it_is(url: str) -> None:
    await asyncio.to_thread(migrate_as_newer, url)
    done = await asyncio.to_thread(migrate, url)
    assert (done.before, done.after) == ("9999", "9999")
    assert await asyncio.to_thread(schema_revision, url) == ("9999", "9999")
    store = open_store(url)
    try:
        spec = JobSpec("base", "ds-1")
        job = await store.create_job("team", "ft-1", spec, None)
        assert (await store.get_job("team", "ft-1")).id == job.id
    finally:
        await store.close()


@pytest.mark.parametrize("wrong", ["nonsense", "mysql://user:hidden@host/db", "sqlite://", "sqlite:///:memory:"])
def test_a_url_of_another_database_is_refused_without_telling_its_password(wrong: str) -> None:
    for use in (open_store, migrate):
        with pytest.raises(InvalidArgument, match="GRAFT_STORE_URL") as refusal:
            use(wrong)
        assert "hidden" not in refusal.value.message


async def test_a_url_without_a_driver_gets_ours(url: str) -> None:
    plain = make_url(url).set(drivername=make_url(url).get_backend_name()).render_as_string(hide_password=False)
    await asyncio.to_thread(migrate, plain)
    store = open_store(plain)
    await store.ping()
    await store.close()


async def test_a_database_that_is_gone_is_unavailable_with_a_hint() -> None:
    lost = open_store("postgresql+psycopg://graft@127.0.0.1:1/postgres")
    with pytest.raises(Unavailable, match="GRAFT_STORE_URL"):
        await lost.ping()
    await lost.close()


async def test_a_full_disk_is_told_as_such_and_leaves_nothing_behind(tmp_path: Path) -> None:
    url = f"sqlite+aiosqlite:///{tmp_path / 'graft.db'}"
    await asyncio.to_thread(migrate, url)
    database = Database(url)

    @event.listens_for(database.engine.sync_engine, "connect")
    def limit(connection: object, _record: object) -> None:
        # SQLite raises this to the file's present size, so that no page can be added.
        connection.cursor().execute("PRAGMA max_page_count=1")  # type: ignore[attr-defined]

    store = SqlStore(database)
    spec = JobSpec("base", "ds-1", metadata={"filler": "x" * 100_000})
    try:
        with pytest.raises(ResourceExhausted, match="disk is full"):
            await store.create_job("default", "ft-1", spec, None)
        assert (await store.list_jobs("default", 10, "")).items == ()
    finally:
        await store.close()


def test_the_command_makes_a_key_that_the_store_finds(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GRAFT_HOME", str(tmp_path))
    monkeypatch.setenv("GRAFT_STORE_URL", url)
    assert main(["migrate"]) == 0
    assert capsys.readouterr().out.startswith("Migrated from revision none to ")
    assert main(["add-key", "--project", "team", "--label", "laptop"]) == 0
    secret = capsys.readouterr().out.strip()

    async def project() -> str | None:
        store = open_store(url)
        try:
            return await store.find_key(hashlib.sha256(secret.encode()).hexdigest())
        finally:
            await store.close()

    assert asyncio.run(project()) == "team"
    assert main(["add-key", "--project", "Not A Name"]) == 2
    monkeypatch.setenv("GRAFT_STORE_URL", "postgresql://graft@127.0.0.1:1/none")
    assert main(["migrate"]) == 1
    assert "GRAFT_STORE_URL" in capsys.readouterr().err
