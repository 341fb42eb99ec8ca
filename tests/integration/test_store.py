"""The store's promises about data sets, the registry's mirror and keys, on SQLite and on a real PostgreSQL."""

import asyncio
import base64
import json
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import IntegrityError

from graft.domain.errors import FailedPrecondition, InvalidArgument, NotFound
from graft.domain.jobs import JobError, JobSpec, JobState, ServedAs
from graft.domain.reports import DatasetReport, FoundRows, LabelCount, LengthBin, TrainingEstimate
from graft.domain.resources import Adapter, AdapterVersion, BaseModel, Dataset, DatasetFormat, RegistrySnapshot
from graft.domain.shapes import Shape
from graft.store.database import Database
from graft.store.mirror import MirrorStore
from graft.store.protocol import AliasWish, DatasetCheck, Store
from graft.store.sql import SqlStore, open_store

pytestmark = pytest.mark.integration
LEASE = timedelta(seconds=30)
NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
SPEC = JobSpec(base_model="base", training_dataset="ds-1", validation_dataset="ds-2")


def _dataset(number: int = 1) -> Dataset:
    when = NOW + timedelta(seconds=number)
    return Dataset(
        f"ds-{number}", "default", "a.jsonl", DatasetFormat.MESSAGES, 10, 2**40, "sha256:0", "/x", create_time=when
    )


async def test_the_store_is_what_the_protocol_says(store: SqlStore) -> None:
    checked: Store = store
    await checked.ping()
    assert abs((await checked.now()) - datetime.now(UTC)) < timedelta(minutes=1)


async def test_a_retried_upload_returns_the_first_data_set(store: SqlStore) -> None:
    made = await asyncio.gather(*(store.create_dataset(_dataset(n), "request") for n in range(5)))
    assert len({dataset.id for dataset in made}) == 1
    assert await store.find_dataset_by_request("default", "request") == made[0]
    assert await store.find_dataset_by_request("default", "unheard") is None


async def test_an_upload_is_stored_where_the_first_of_its_request_is_deleted_meanwhile(
    store: SqlStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = store.find_dataset_by_request

    async def later(project: str, request_id: str) -> Dataset | None:
        monkeypatch.undo()
        await store.delete_dataset(project, _dataset(1).id)
        return await find(project, request_id)

    await store.create_dataset(_dataset(1), "request")
    monkeypatch.setattr(store, "find_dataset_by_request", later)
    assert await store.create_dataset(_dataset(2), "request") == _dataset(2)
    assert await store.find_dataset_by_request("default", "request") == _dataset(2)
    with pytest.raises(IntegrityError):  # an id twice is a defect, whatever the request
        await store.create_dataset(_dataset(2), "another")


async def test_a_caller_that_is_cancelled_inside_a_transaction_leaves_the_database_to_others(
    store: SqlStore, url: str
) -> None:
    # Its first row comes late and more follow: the caller is cancelled before it, and the query is left unfinished.
    numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 300000) SELECT i FROM n"
    asked, database = asyncio.Event(), Database(url)

    @event.listens_for(database.engine.sync_engine, "before_cursor_execute")
    def before(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if statement.startswith(numbers):
            asked.set()

    async def write() -> None:
        try:
            async with database.write() as connection:
                await connection.execute(text("UPDATE jobs SET attempt = attempt"))
                await connection.execute(text(f"{numbers} WHERE i > 299000"))
        finally:  # as a stopped orchestrator frees its leases: the frames of the cancellation are still there
            await store.create_job("default", "ft-1", SPEC, None)

    writer = asyncio.create_task(write())
    await asked.wait()
    writer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writer
    await database.close()
    assert (await store.get_job("default", "ft-1")).spec == SPEC


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


async def test_a_page_token_that_no_list_returned_is_refused(store: SqlStore) -> None:
    def token(value: object) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

    wrong = [
        [],
        {},
        [1],
        [1, 2],
        ["a", "b"],
        [True, "a"],
        [-1, "a"],
        [10**30, "a"],
        [1, "a\0"],
        [1, "\ud800"],
        [1, "é"],
    ]
    deep = base64.urlsafe_b64encode(b"[" * 100_000).decode()
    for bad in ("garbage", "W10", "!", "é", deep, *map(token, wrong)):
        with pytest.raises(InvalidArgument, match="page_token"):
            await store.list_datasets("default", 3, bad)


async def test_text_that_a_database_cannot_hold_is_the_callers_fault(store: SqlStore) -> None:
    for name in ("a\0b", "\ud800"):
        with pytest.raises((NotFound, InvalidArgument)):
            await store.get_dataset("default", name)


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


SHAPE = Shape(2, 64, 128, 64, 32, 300, tied=True)


def _base(name: str) -> BaseModel:
    return BaseModel(
        name, "/m", "sha256:b", 2**33, 1, 2048, "Apache-2.0", "package", ("q_proj", "v_proj"), 64, shape=SHAPE
    )


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
        ServedAs.MERGED_MODEL if number == 3 else ServedAs.ADAPTER,
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


async def test_a_model_is_resolved_by_one_statement(store: SqlStore, url: str) -> None:
    versions = tuple(_version("a", number) for number in (1, 2, 3))
    other = Adapter("default", "base", "b", {"pre-release": 1}, 1, NOW)
    adapters = (Adapter("default", "base", "a", {"champion": 1, "pre-release": 3}, 3, NOW), other)
    await store.replace_registry(RegistrySnapshot(adapters, (*versions, _version("b", 1))))
    database, statements = Database(url), list[str]()

    @event.listens_for(database.engine.sync_engine, "before_cursor_execute")
    def before(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if "adapter" in statement:
            statements.append(statement)

    mirror = MirrorStore(database)
    for number, (version, alias) in enumerate(((None, "champion"), (2, None), (None, "pre-release")), start=1):
        found = await mirror.resolve_version("default", "base", "a", version=version, alias=alias)
        assert found == versions[number - 1]
        assert len(statements) == number
    await database.close()


async def test_a_data_set_is_checked_once_and_again_after_a_failure(store: SqlStore) -> None:
    asked = DatasetCheck("dc-1", "default", "ds-1", "base", None, 100, 1.0)
    assert await store.request_dataset_check(asked) == asked
    assert await store.request_dataset_check(asked) == asked
    assert await store.pending_dataset_checks() == (asked,)
    error = JobError("NOT_FOUND", "DATASET_FILE_MISSING", "gone")
    await store.finish_dataset_check("dc-1", None, error)
    assert (await store.get_dataset_check("dc-1")).error == error
    assert await store.request_dataset_check(asked) == asked
    report = DatasetReport(
        format="text",
        row_count=2**40,
        size_bytes=1,
        base_model="base",
        length_unit="tokens",
        ignored_fields=("label",),
        shortest=1,
        median=2,
        longest=3,
        histogram=(LengthBin(0, 1, 2),),
        duplicates=FoundRows(1, (2,)),
        empty=FoundRows(0),
        conflicting=FoundRows(0),
        labels=(LabelCount("é", 2),),
        leaked=FoundRows(1, (1,)),
        estimate=TrainingEstimate(10, 1.0, 5.0, 2.0, "a guess"),
        notes=("told",),
    )
    await store.finish_dataset_check("dc-1", report, None)
    assert await store.pending_dataset_checks() == ()
    await store.finish_dataset_check("dc-1", None, error)  # by one that was slower
    assert (await store.request_dataset_check(asked)).report == report
    with pytest.raises(NotFound):
        await store.get_dataset_check("dc-2")


async def test_a_refusal_names_twenty_adapters_and_counts_the_others_in_the_database(store: SqlStore, url: str) -> None:
    names = [f"a{number:02d}" for number in range(25)]
    await store.replace_base_models([_base("base")])
    await store.replace_registry(
        RegistrySnapshot(tuple(Adapter("default", "base", name, {}, 1, NOW) for name in names), ())
    )
    database, statements = Database(url), list[str]()

    @event.listens_for(database.engine.sync_engine, "before_cursor_execute")
    def before(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        statements.append(statement)

    try:
        with pytest.raises(NotFound, match=r"base:a19 and 5 more\.$") as refused:
            await MirrorStore(database).get_adapter("default", "base", "nope")
    finally:
        await database.close()
    assert "base:a20" not in str(refused.value)
    (listed,) = [statement for statement in statements if "ORDER BY adapters.adapter" in statement]
    assert "LIMIT" in listed


async def test_only_what_differs_from_a_snapshot_is_written(store: SqlStore, url: str) -> None:
    def snapshot(champion_of_b: int, *names: str) -> RegistrySnapshot:
        aliases = {"b": champion_of_b}
        adapters = (Adapter("default", "base", name, {"champion": aliases.get(name, 1)}, 2, NOW) for name in names)
        return RegistrySnapshot(tuple(adapters), tuple(_version(name, number) for name in names for number in (1, 2)))

    database, written = Database(url), list[tuple[str, int]]()

    @event.listens_for(database.engine.sync_engine, "before_cursor_execute")
    def before(
        _connection: object, _cursor: object, statement: str, given: object, _context: object, many: bool
    ) -> None:
        if statement.startswith(("INSERT", "UPDATE", "DELETE")):
            written.append((" ".join(statement.split()[:3]), len(given) if many else 1))  # type: ignore[arg-type]

    mirror = MirrorStore(database)
    try:
        await mirror.replace_registry(snapshot(1, "a", "b", "c"))
        written.clear()
        await mirror.replace_registry(snapshot(1, "a", "b", "c"))
        assert written == []
        await mirror.replace_registry(snapshot(2, "a", "b", "c"))
        assert written == [("DELETE FROM adapters", 1), ("INSERT INTO adapters", 1)]
        assert (await store.resolve_version("default", "base", "b", version=None, alias="champion")).version == 2
        await mirror.replace_registry(snapshot(2, "b", "c", "d"))
        page = await store.list_adapters("default", None, 10, "")
        assert page.items == snapshot(2, "b", "c", "d").adapters
        with pytest.raises(NotFound):
            await store.resolve_version("default", "base", "a", version=1, alias=None)
        assert (await store.resolve_version("default", "base", "d", version=2, alias=None)) == _version("d", 2)
    finally:
        await database.close()


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


async def test_mirrors_that_write_at_once_leave_one_whole_snapshot(store: SqlStore, url: str) -> None:
    second = open_store(url)
    snapshots = [
        RegistrySnapshot((Adapter("default", "base", "a", {"champion": n}, n, NOW),), (_version("a", n),))
        for n in (1, 2)
    ]
    try:
        for _ in range(5):
            writers = zip((store, second, store, second), snapshots * 2, strict=True)
            await asyncio.gather(
                *(writer.replace_registry(snapshot) for writer, snapshot in writers),
                *(writer.replace_base_models([_base("base")]) for writer in (store, second)),
            )
            found = await store.resolve_version("default", "base", "a", version=None, alias="champion")
            assert (await store.list_versions("default", "base", "a", 10, "")).items == (found,)
    finally:
        await second.close()
