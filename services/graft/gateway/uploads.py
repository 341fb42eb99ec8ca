"""Data set files: one temporary file beside its target, validated as it streams in, renamed when proven.

Owns `datasets/{project}/{id}.jsonl`, `.csv` or `.parquet`, as the content is, below the home or in the shared storage.
A file for the latter is written in the home all the same until it is proven. Nothing of a failed or abandoned upload
stays.
"""

import asyncio
import errno
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from graft.data.formats import FileReport, FileValidator, validate_file
from graft.data.reading import Container
from graft.domain.errors import GraftError, NotFound, ResourceExhausted
from graft.domain.resources import Dataset, DatasetFormat
from graft.settings import MIB, Settings
from graft.storage import is_url, open_storage
from graft.store.protocol import Store


def dataset_file(settings: Settings, dataset: Dataset) -> Path | None:
    """Where a data set lies on this host, fetched from the shared storage if need be; None when its file is gone."""
    if is_url(dataset.uri):
        with suppress(NotFound):
            return open_storage(settings).fetch(dataset.uri, settings.home.cache)
        return None
    return next((path for path in _files(settings, dataset.project, dataset.id) if path.is_file()), None)


async def on_this_host(settings: Settings, dataset: Dataset) -> Dataset:
    """The data set with the path that its file has here as its `uri`; as it is when the file is gone."""
    if not is_url(dataset.uri):
        return dataset
    path = await asyncio.to_thread(dataset_file, settings, dataset)
    return dataset if path is None else replace(dataset, uri=str(path))


def remove_dataset_file(settings: Settings, dataset: Dataset) -> None:
    """Removes a data set's file; it may be gone already."""
    if is_url(dataset.uri):
        storage = open_storage(settings)
        storage.cached(dataset.uri, settings.home.cache).unlink(missing_ok=True)
        storage.delete(dataset.uri)
    for path in _files(settings, dataset.project, dataset.id):
        path.unlink(missing_ok=True)


def _files(settings: Settings, project: str, dataset_id: str) -> list[Path]:
    folder = settings.home.path / "datasets" / project
    return [folder / f"{dataset_id}.{container}" for container in Container]


class Upload:
    """One upload, an async context manager: `write` pieces, then `finish`. Leaving without `finish` removes it all."""

    def __init__(
        self,
        store: Store,
        settings: Settings,
        project: str,
        display_name: str,
        request_id: str | None,
        format: DatasetFormat | None = None,
    ) -> None:
        self._rows = store
        self._settings = settings
        self._project = project
        self._display_name = display_name
        self._request_id = request_id
        self._id = f"ds-{secrets.token_hex(6)}"
        self._folder = settings.home.path / "datasets" / project
        self._temporary = self._folder / f"{self._id}.part"
        self._file: BinaryIO | None = None
        self._declared = format
        self._validator = FileValidator(format)
        self._size_bytes = 0
        self._finishing: asyncio.Future[Dataset] | None = None
        self._first: Dataset | None = None
        """What an earlier upload with the same `request_id` stored: this one is then read and dropped."""

    async def __aenter__(self) -> Self:
        if self._request_id is not None:
            self._first = await self._rows.find_dataset_by_request(self._project, self._request_id)
        if self._first is None:
            self._file = self._open()  # not in a thread: a cancelled await would leave the file without an owner
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._finishing is not None:
            await asyncio.wait({self._finishing})
        # Not in a thread: a cancelled upload must not leave its file behind.
        if self._file is not None:
            with suppress(OSError):  # close flushes: on a full disk it fails, and the file goes anyway
                self._file.close()
            self._temporary.unlink(missing_ok=True)

    async def write(self, chunk: bytes) -> None:
        """Takes the next bytes. Raises ResourceExhausted over the size limit or on a full disk."""
        self._size_bytes += len(chunk)
        limit = self._settings.gateway.max_upload_bytes
        if self._size_bytes > limit:
            raise ResourceExhausted(
                f"The file is larger than the limit of {limit / MIB:.0f} MiB ({limit} bytes). Split it, or raise "
                "GRAFT_GATEWAY_MAX_UPLOAD_BYTES.",
                reason="UPLOAD_TOO_LARGE",
                metadata={"max_upload_bytes": str(limit)},
            )
        if self._first is None and chunk:
            await asyncio.to_thread(self._take, chunk)

    def declare(self, format: DatasetFormat) -> None:
        """Says which format the rows have; may come after the file, as in a form."""
        self._declared = format

    async def finish(self) -> Dataset:
        """Stores the data set. Raises InvalidArgument (BAD_DATASET, AMBIGUOUS_DATASET) with the bad rows or the formats
        that it may have; nothing is stored then."""
        if self._first is not None:
            return self._first
        # gRPC ends the stream of a client that left as if it were complete, and cancels a moment later: proving takes
        # longer than that moment, so that half a file is dropped here.
        report = await asyncio.to_thread(self._prove)
        # Shielded: a client that leaves now must not part the row from its file.
        self._finishing = asyncio.ensure_future(self._store(report))
        return await asyncio.shield(self._finishing)

    async def _store(self, report: FileReport) -> Dataset:
        name = f"{self._id}.{report.container}"
        target = self._folder / name
        storage = open_storage(self._settings)
        uri = storage.uri("datasets", self._project, name) if storage.shared else str(target)
        try:
            await asyncio.to_thread(self._rename, target)
            if storage.shared:
                await asyncio.to_thread(storage.put_file, target, uri)
                await asyncio.to_thread(_keep_copy, target, storage.cached(uri, self._settings.home.cache))
            dataset = Dataset(
                id=self._id,
                project=self._project,
                display_name=self._display_name,
                format=report.format,
                row_count=report.row_count,
                size_bytes=report.size_bytes,
                digest=report.digest,
                uri=uri,
                create_time=await self._rows.now(),
                labels=dict(report.labels),
            )
            stored = await self._rows.create_dataset(dataset, self._request_id)
        except BaseException:
            await asyncio.to_thread(self._drop, uri)
            raise
        if stored.id != self._id:  # the same request came twice at once, and the other was first
            await asyncio.to_thread(self._drop, uri)
        return stored

    def _drop(self, uri: str) -> None:
        for path in _files(self._settings, self._project, self._id):
            path.unlink(missing_ok=True)
        if is_url(uri):
            storage = open_storage(self._settings)
            storage.cached(uri, self._settings.home.cache).unlink(missing_ok=True)
            with suppress(GraftError):  # what brought us here may be that the storage is away
                storage.delete(uri)

    def _open(self) -> BinaryIO:
        with _full_disk_told():
            self._folder.mkdir(parents=True, exist_ok=True)
            return self._temporary.open("xb")

    def _take(self, chunk: bytes) -> None:
        assert self._file is not None
        with _full_disk_told():
            self._file.write(chunk)
        self._validator.feed(chunk)

    def _prove(self) -> FileReport:
        """Validates to the end and makes the content durable."""
        assert self._file is not None
        with _full_disk_told():
            self._file.flush()
            os.fsync(self._file.fileno())
        if self._declared is not self._validator.declared:
            return validate_file(self._temporary, self._declared)
        return self._validator.finish(self._temporary)

    def _rename(self, target: Path) -> None:
        """Gives the file its name, durably."""
        with _full_disk_told():
            self._temporary.rename(target)
            folder = os.open(self._folder, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def _keep_copy(file: Path, copy: Path) -> None:
    """The file that was put is this host's copy of it: the next request may read it."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(file, copy)


@contextmanager
def _full_disk_told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ResourceExhausted(
            "The disk that holds GRAFT_HOME is full; nothing was stored. Free space there, or delete data sets, and "
            "upload again.",
            reason="DISK_FULL",
        ) from error


def remove_abandoned(settings: Settings) -> int:
    """Removes what a killed gateway left of its uploads; returns how many files.

    Only files untouched for a day: another gateway on the same storage may be writing younger ones.
    """
    old, removed = time.time() - 24 * 3600, 0
    for path in (settings.home.path / "datasets").glob("*/*.part"):
        with suppress(FileNotFoundError):  # another gateway's, which has its name by now, or has been removed
            if path.stat().st_mtime < old:
                path.unlink()
                removed += 1
    return removed
