"""Data sets through the public gRPC door: stored whole or not at all."""

import asyncio
import errno
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from graft.api.v1 import dataset_pb2, dataset_service_pb2
from graft.api.v1.dataset_service_pb2_grpc import DatasetServiceStub
from graft.domain.errors import InvalidArgument, NotFound, ResourceExhausted, Unavailable
from graft.domain.resources import Dataset, DatasetFormat
from graft.gateway import convert, uploads
from graft.settings import load
from tests.support.gateways import ROWS, Gateway, eventually, gateway, refused

Request = dataset_service_pb2.UploadDatasetRequest


def pieces(content: bytes, size: int = 20, **header: Any) -> Iterator[Request]:
    yield Request(header=Request.Header(**{"parent": "projects/default", "display_name": "rows.jsonl"} | header))
    for start in range(0, len(content), size):
        yield Request(chunk=content[start : start + size])


def files(it: Gateway) -> list[Path]:
    return [path for path in it.settings.home.path.glob("datasets/**/*") if path.is_file()]


async def test_an_uploaded_data_set_is_stored_found_listed_and_deleted(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        stub = DatasetServiceStub(it.channel)
        made = await stub.UploadDataset(pieces(ROWS))
        assert made.name.startswith("projects/default/datasets/ds-")
        assert made.format == dataset_pb2.DATASET_FORMAT_PROMPT_COMPLETION
        assert (made.row_count, made.size_bytes, made.display_name) == (2, len(ROWS), "rows.jsonl")
        assert made.digest == f"sha256:{hashlib.sha256(ROWS).hexdigest()}"
        assert [path.read_bytes() for path in files(it)] == [ROWS]
        dataset_id = made.name.rsplit("/", 1)[1]
        assert (await it.core.dataset_path("default", dataset_id)).read_bytes() == ROWS
        assert await stub.GetDataset(dataset_service_pb2.GetDatasetRequest(name=made.name)) == made
        listed = await stub.ListDatasets(dataset_service_pb2.ListDatasetsRequest(parent="projects/default"))
        assert list(listed.datasets) == [made]
        await stub.DeleteDataset(dataset_service_pb2.DeleteDatasetRequest(name=made.name))
        assert files(it) == []
        error = await refused(stub.GetDataset(dataset_service_pb2.GetDatasetRequest(name=made.name)))
        assert isinstance(error, NotFound)
        assert dataset_id in error.message


async def test_a_client_that_leaves_in_the_middle_of_a_deletion_leaves_no_file_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with gateway(tmp_path) as it:
        made = await DatasetServiceStub(it.channel).UploadDataset(pieces(ROWS))
        delete, deleted, left = it.core.store.delete_dataset, asyncio.Event(), asyncio.Event()

        async def slow(project: str, dataset_id: str) -> Dataset:
            found = await delete(project, dataset_id)
            deleted.set()
            await left.wait()
            return found

        monkeypatch.setattr(it.core.store, "delete_dataset", slow)
        deleting = asyncio.create_task(it.core.delete_dataset("default", made.name.rsplit("/", 1)[1]))
        await deleted.wait()
        deleting.cancel()  # as gRPC cancels a call whose client has gone
        await asyncio.wait({deleting})
        assert deleting.cancelled()
        left.set()
        await eventually(lambda: files(it) == [])


async def test_with_a_shared_storage_a_data_set_lies_there_and_is_read_from_any_gateway(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    async with gateway(tmp_path, GRAFT_STORAGE_URL=f"file://{shared}") as it:
        stub = DatasetServiceStub(it.channel)
        made = await stub.UploadDataset(pieces(ROWS))
        dataset_id = made.name.rsplit("/", 1)[1]
        there = shared / "datasets" / "default" / f"{dataset_id}.jsonl"
        assert there.read_bytes() == ROWS
        assert files(it) == []
        shutil.rmtree(it.settings.home.cache)  # as on another host, which has no copy
        assert (await it.core.dataset_path("default", dataset_id)).read_bytes() == ROWS
        await stub.DeleteDataset(dataset_service_pb2.DeleteDatasetRequest(name=made.name))
        assert not there.exists()
        assert not list(it.settings.home.cache.glob("storage/*.jsonl"))


async def test_a_storage_that_refuses_leaves_neither_row_nor_file(tmp_path: Path) -> None:
    (tmp_path / "shared").write_text("A file where a folder should be.")
    async with gateway(tmp_path, GRAFT_STORAGE_URL=f"file://{tmp_path / 'shared'}") as it:
        stub = DatasetServiceStub(it.channel)
        assert isinstance(await refused(stub.UploadDataset(pieces(ROWS))), Unavailable)
        listed = await stub.ListDatasets(dataset_service_pb2.ListDatasetsRequest(parent="projects/default"))
        assert list(listed.datasets) == []
        assert files(it) == []


async def test_a_file_with_bad_lines_is_refused_with_their_count_and_stores_nothing(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        bad = ROWS + b"not json\n" * 30
        error = await refused(DatasetServiceStub(it.channel).UploadDataset(pieces(bad)))
        assert isinstance(error, InvalidArgument)
        assert error.reason == "BAD_DATASET"
        assert error.metadata["bad_lines"] == "30"
        assert len(error.violations) == 20
        assert error.violations[0].field.startswith("line 3")
        assert files(it) == []


async def test_an_upload_over_the_limit_is_refused_by_counting_and_stores_nothing(tmp_path: Path) -> None:
    async with gateway(tmp_path, GRAFT_GATEWAY_MAX_UPLOAD_BYTES="50") as it:
        error = await refused(DatasetServiceStub(it.channel).UploadDataset(pieces(ROWS)))
        assert isinstance(error, ResourceExhausted)
        assert error.reason == "UPLOAD_TOO_LARGE"
        assert "GRAFT_GATEWAY_MAX_UPLOAD_BYTES" in error.message
        assert files(it) == []


async def test_a_repeated_upload_returns_the_first_ones_data_set(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        stub = DatasetServiceStub(it.channel)
        first = await stub.UploadDataset(pieces(ROWS, request_id="one"))
        assert await stub.UploadDataset(pieces(ROWS, request_id="one")) == first
        assert len(files(it)) == 1


async def test_a_client_that_leaves_in_the_middle_of_an_upload_leaves_nothing(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        for sent in range(6):  # at every stage: what was sent so far would make a legal file
            call = DatasetServiceStub(it.channel).UploadDataset()
            for piece in list(pieces(ROWS + ROWS, len(ROWS)))[: sent % 3 + 1]:
                await call.write(piece)
            await asyncio.sleep(0.02 * (sent // 3))
            call.cancel()
        await asyncio.sleep(0.3)  # for what has not begun, and would be kept
        await eventually(lambda: files(it) == [])
        assert (await it.core.list_datasets("default")).items == ()


async def test_a_full_disk_is_told_in_a_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(uploads.os, "fsync", full)
    async with gateway(tmp_path) as it:
        error = await refused(DatasetServiceStub(it.channel).UploadDataset(pieces(ROWS)))
        assert isinstance(error, ResourceExhausted)
        assert error.reason == "DISK_FULL"
        assert files(it) == []


@pytest.mark.parametrize("name", ["x" * 256, "rows\x1b[2J.jsonl", "two\nlines", "\x9b31m"])
async def test_a_name_that_a_terminal_would_obey_or_that_has_no_end_is_refused(tmp_path: Path, name: str) -> None:
    async with gateway(tmp_path) as it:
        error = await refused(DatasetServiceStub(it.channel).UploadDataset(pieces(ROWS, display_name=name)))
        assert (error.code, error.reason) == ("INVALID_ARGUMENT", "INVALID_DISPLAY_NAME")
        assert error.violations[0].field == "display_name"
        assert files(it) == []


async def test_an_upload_without_its_header_is_refused(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        error = await refused(DatasetServiceStub(it.channel).UploadDataset(iter([Request(chunk=ROWS)])))
        assert isinstance(error, InvalidArgument)
        assert error.violations[0].field == "header"


async def test_a_data_set_stored_by_nobody_is_not_kept_when_the_row_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with gateway(tmp_path) as it:

        async def broken(*_: Any) -> None:
            raise ValueError("secret detail")

        monkeypatch.setattr(it.store, "create_dataset", broken)
        error = await refused(DatasetServiceStub(it.channel).UploadDataset(pieces(ROWS)))
        assert error.code == "INTERNAL"
        assert "secret" not in error.message
        assert error.metadata["request_id"] in error.message
        assert files(it) == []


async def test_a_parent_that_is_no_project_is_refused_by_its_form(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        for parent in ("projects/../..", "default", "projects/A b"):
            error = await refused(DatasetServiceStub(it.channel).UploadDataset(pieces(ROWS, parent=parent)))
            assert isinstance(error, InvalidArgument)
            assert error.violations[0].field == "header.parent"
        assert files(it) == []


CSV = b"text,label\ngood,1\nbad,0\n"


async def test_a_csv_file_is_stored_as_it_came_and_a_declared_format_settles_what_it_is(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        stub = DatasetServiceStub(it.channel)
        error = await refused(stub.UploadDataset(pieces(CSV)))
        assert (error.reason, error.metadata["candidates"]) == ("AMBIGUOUS_DATASET", "text, fields")
        assert files(it) == []
        made = await stub.UploadDataset(pieces(CSV, format=dataset_pb2.DATASET_FORMAT_FIELDS))
        assert (made.format, made.row_count) == (dataset_pb2.DATASET_FORMAT_FIELDS, 2)
        assert made.digest == f"sha256:{hashlib.sha256(CSV).hexdigest()}"
        (path,) = files(it)
        assert (path.suffix, path.read_bytes()) == (".csv", CSV)
        dataset_id = made.name.rsplit("/", 1)[1]
        assert await it.core.dataset_path("default", dataset_id) == path
        await stub.DeleteDataset(dataset_service_pb2.DeleteDatasetRequest(name=made.name))
        assert files(it) == []
        error = await refused(stub.UploadDataset(pieces(CSV, format=99)))
        assert (error.reason, error.violations[0].field) == ("INVALID_FORMAT", "header.format")


async def test_a_parquet_file_is_validated_before_it_is_stored(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    def content(*texts: str) -> bytes:
        parquet.write_table(pa.table({"text": list(texts)}), tmp_path / "rows")
        return (tmp_path / "rows").read_bytes()

    async with gateway(tmp_path) as it:
        stub = DatasetServiceStub(it.channel)
        error = await refused(stub.UploadDataset(pieces(content("a", " "))))
        assert (error.reason, error.violations[0].field) == ("BAD_DATASET", "row 2: text")
        assert files(it) == []
        made = await stub.UploadDataset(pieces(content("a", "b")))
        assert (made.format, made.row_count) == (dataset_pb2.DATASET_FORMAT_TEXT, 2)
        assert [path.suffix for path in files(it)] == [".parquet"]


def test_every_format_has_a_number_and_every_number_a_format() -> None:
    told = {convert.declared_format(number) for number in dataset_pb2.DatasetFormat.values()}
    assert told == {None, *DatasetFormat}


def test_what_a_killed_gateway_left_goes_and_what_another_one_finishes_meanwhile_is_not_missed(tmp_path: Path) -> None:
    settings = load({"GRAFT_HOME": str(tmp_path)})
    folder = tmp_path / "datasets" / "default"
    folder.mkdir(parents=True)
    for name, age_seconds in (("old.part", 2 * 24 * 3600), ("young.part", 60)):
        (folder / name).write_text("{}")
        os.utime(folder / name, (time.time() - age_seconds,) * 2)
    (folder / "finished.part").symlink_to(folder / "nowhere")  # seen, and gone when it is looked at
    assert uploads.remove_abandoned(settings) == 1
    assert {path.name for path in folder.iterdir()} == {"young.part", "finished.part"}
