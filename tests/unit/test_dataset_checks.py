"""Checks of stored data sets: asked for through gRPC and the SDK, made by the orchestrator's checker."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from graft.api.v1 import dataset_pb2, dataset_service_pb2
from graft.api.v1.dataset_service_pb2_grpc import DatasetServiceStub
from graft.client import AsyncGraft, Connection, Graft
from graft.data.tasks.catalog import builtin
from graft.domain.errors import InvalidArgument, NotFound, Unavailable
from graft.gateway import dataset_checks
from graft.orchestrator.checking import Checker
from tests.support.gateways import BASE, Gateway, base_model, gateway, refused
from tests.support.tiny_llama import make_tiny_llama

CSV = b"prompt,completion\n" + b"".join(b"film %d,%s\n" % (n, b"yes" if n % 4 else b"no") for n in range(40))
HELD_OUT = b'{"prompt": "film 1", "completion": "yes"}\n{"prompt": "new", "completion": "no"}\n'


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))


@asynccontextmanager
async def checking(tmp_path: Path, base_folder: Path) -> AsyncIterator[Gateway]:
    """A gateway, and a checker at work on its store."""
    async with gateway(tmp_path) as it:
        await it.store.replace_base_models([replace(base_model(), path=str(base_folder))])
        working = asyncio.create_task(Checker(it.store, 0.01).run())
        try:
            yield it
        finally:
            working.cancel()
            with suppress(asyncio.CancelledError):
                await working


async def uploaded(it: Gateway, tmp_path: Path, content: bytes) -> str:
    (tmp_path / "rows").write_bytes(content)
    async with AsyncGraft(Connection(address=it.address)) as graft:
        return (await graft.upload_dataset(tmp_path / "rows")).name


async def test_a_report_comes_through_both_clients_and_is_made_once(tmp_path: Path, base_folder: Path) -> None:
    async with checking(tmp_path, base_folder) as it:
        train, held_out = await uploaded(it, tmp_path, CSV), await uploaded(it, tmp_path, HELD_OUT)
        async with AsyncGraft(Connection(address=it.address)) as graft:
            report = await graft.validate_dataset(
                train, validation_dataset=held_out, context_tokens=10, epochs=2, base_model=BASE
            )
        assert report.format == dataset_pb2.DATASET_FORMAT_PROMPT_COMPLETION
        assert (report.row_count, report.tokens, report.learned_tokens, report.base_model) == (40, 420, 150, BASE)
        assert (report.over_length.count, list(report.leaked.first_rows)) == (23, [1])
        assert [(one.label, one.row_count) for one in report.labels] == [("yes", 30), ("no", 10)]
        assert sum(one.row_count for one in report.histogram) == 40
        assert (report.estimate.tokens, report.estimate.epochs) == (167, 2.0)

        def again() -> object:
            with Graft(Connection(address=it.address)) as blocking:
                return blocking.validate_dataset(train, validation_dataset=held_out, context_tokens=10, epochs=2)

        Path((await it.store.get_dataset("default", train.rsplit("/", 1)[1])).uri).unlink()
        # The file is gone, but the question was answered: the served base is the one that was named before.
        assert await asyncio.to_thread(again) == report


async def test_rows_of_fields_are_checked_through_a_task(tmp_path: Path, base_folder: Path) -> None:
    rows = b"".join(b'{"review": "film %d", "sentiment": "%s"}\n' % (n, b"positive") for n in range(4))
    (tmp_path / "rows").write_bytes(rows)
    own = builtin("sentiment").to_text()
    async with checking(tmp_path, base_folder) as it, AsyncGraft(Connection(address=it.address)) as graft:
        name = (await graft.upload_dataset(tmp_path / "rows", format="fields")).name
        report = await graft.validate_dataset(name, task="sentiment")
        assert (report.task, report.unusable.count, report.tokens > 0) == ("sentiment", 0, True)
        assert [(one.label, one.row_count) for one in report.labels] == [("positive", 4)]
        assert not (await graft.validate_dataset(name)).HasField("tokens")
        assert await graft.validate_dataset(name, task_definition=own) == report
        for task, told in (({"task": "nope"}, "nope"), ({"task": "chat", "task_definition": own}, "one of them")):
            with pytest.raises(InvalidArgument, match=told):
                await graft.validate_dataset(name, **task)
        with pytest.raises(InvalidArgument) as unfit:
            await graft.validate_dataset(await uploaded(it, tmp_path, CSV), task="sentiment")
        assert unfit.value.reason == "TASK_UNFIT"


async def test_what_cannot_be_checked_is_told_and_may_be_asked_again(tmp_path: Path, base_folder: Path) -> None:
    async with checking(tmp_path, base_folder) as it:
        stub = DatasetServiceStub(it.channel)
        name = await uploaded(it, tmp_path, CSV)
        request = dataset_service_pb2.ValidateDatasetRequest(name=name)
        path = Path((await it.store.get_dataset("default", name.rsplit("/", 1)[1])).uri)
        away = path.rename(tmp_path / "away")
        error = await refused(stub.ValidateDataset(request))
        assert (type(error), error.reason) == (NotFound, "DATASET_FILE_MISSING")
        away.rename(path)
        report = await stub.ValidateDataset(request)
        assert report.row_count == 40
        assert not report.HasField("held_out_row_count")
        assert not report.HasField("leaked")


async def test_questions_that_make_no_sense_are_refused_at_once(tmp_path: Path, base_folder: Path) -> None:
    async with checking(tmp_path, base_folder) as it:
        stub = DatasetServiceStub(it.channel)
        name = await uploaded(it, tmp_path, CSV)
        for wrong, kind, told in (
            ({"name": "projects/default/datasets/ds-none"}, NotFound, "ds-none"),
            ({"name": name, "base_model": "nope"}, NotFound, "nope"),
            ({"name": name, "validation_dataset": "ds-none"}, NotFound, "ds-none"),
            ({"name": name, "context_tokens": -1}, InvalidArgument, "context_tokens"),
            ({"name": name, "epochs": -1.0}, InvalidArgument, "epochs"),
        ):
            error = await refused(stub.ValidateDataset(dataset_service_pb2.ValidateDatasetRequest(**wrong)))
            assert isinstance(error, kind)
            assert told in error.message


async def test_a_check_that_takes_long_goes_on_and_is_found_when_asked_for_again(
    tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_checks, "CHECK_TIMEOUT_SECONDS", 0.2)
    async with gateway(tmp_path) as it:
        await it.store.replace_base_models([replace(base_model(), path=str(base_folder))])
        stub = DatasetServiceStub(it.channel)
        request = dataset_service_pb2.ValidateDatasetRequest(name=await uploaded(it, tmp_path, CSV))
        error = await refused(stub.ValidateDataset(request))
        assert isinstance(error, Unavailable)
        assert error.reason == "CHECK_RUNNING"
        (pending,) = await it.store.pending_dataset_checks()
        monkeypatch.setattr(dataset_checks, "CHECK_TIMEOUT_SECONDS", 60.0)
        working = asyncio.create_task(Checker(it.store, 0.01).run())
        report = await stub.ValidateDataset(request)
        working.cancel()
        assert report.row_count == 40
        assert await it.store.pending_dataset_checks() == ()
        assert (await it.store.get_dataset_check(pending.id)).done
