"""An upload as requests: its header and its chunks, from a local file or whatever fsspec opens."""

import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from graft.api.v1 import dataset_service_pb2
from graft.client.requests import dataset_format
from graft.domain.errors import FailedPrecondition, FieldViolation, InvalidArgument

CHUNK_BYTES = 256 * 1024
"""Well under gRPC's 4 MiB message limit, large enough that overhead does not show."""


class Upload:
    """Header and chunks of a file, or of what an fsspec URL names (`s3://`, `https://`, `memory://` and so on).

    An iterator and a context manager. gRPC reads requests in a thread of its own, where an exception is lost: what
    went wrong with the file meanwhile is kept in `failure`.
    """

    def __init__(
        self,
        parent: str,
        source: str | Path,
        display_name: str,
        format: str = "",
        progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        """`format` declares the rows' layout, for example `alpaca`; empty: it is recognised. `progress` is told the
        bytes read so far, in whatever thread reads.

        Raises InvalidArgument, before anything is sent, when the file cannot be read or the format is none.
        """
        self.failure: InvalidArgument | None = None
        self._name = str(source)
        self._progress = progress
        self._read_bytes = 0
        number = dataset_format(format)
        is_url = "://" in self._name
        self._file = _open_url(self._name) if is_url else _open_file(Path(source))
        plain = self._name.split("?")[0] if is_url else self._name
        self._header: dataset_service_pb2.UploadDatasetRequest.Header | None
        self._header = dataset_service_pb2.UploadDatasetRequest.Header(
            parent=parent,
            display_name=display_name or plain.rstrip("/").rsplit("/", 1)[-1],
            request_id=str(uuid.uuid4()),
            format=number,
        )

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> dataset_service_pb2.UploadDatasetRequest:
        if self._header is not None:
            header, self._header = self._header, None
            return dataset_service_pb2.UploadDatasetRequest(header=header)
        if self._file.closed:  # the gateway has refused it already
            raise StopIteration
        try:
            chunk = self._file.read(CHUNK_BYTES)
        except Exception as error:  # each file system has exceptions of its own
            self.failure = _unreadable(self._name, str(error) or type(error).__name__)
            raise
        if not chunk:
            raise StopIteration
        self._read_bytes += len(chunk)
        self._progress(self._read_bytes)
        return dataset_service_pb2.UploadDatasetRequest(chunk=chunk)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the file. Raises `failure` in the place of what the gateway made of it."""
        self._file.close()
        if error is not None and self.failure is not None:
            raise self.failure from None


def _open_file(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise _unreadable(str(path), error.strerror or str(error)) from None


def _open_url(url: str) -> BinaryIO:
    try:
        import fsspec
    except ImportError:
        raise FailedPrecondition(
            f"{url} needs fsspec, which is not installed. Install it with `pip install fsspec`.",
            reason="FSSPEC_MISSING",
        ) from None
    try:
        file: BinaryIO = fsspec.open(url, "rb").open()
    except ImportError as error:  # fsspec says which package, for example s3fs
        raise FailedPrecondition(
            f"{url} cannot be opened: {error}", reason="FILE_SYSTEM_MISSING", metadata={"url": url}
        ) from None
    except Exception as error:  # noqa: BLE001 - each file system has exceptions of its own
        raise _unreadable(url, str(error) or type(error).__name__) from None
    return file


def _unreadable(path: str, why: str) -> InvalidArgument:
    """A file that cannot be opened or read."""
    return InvalidArgument(
        f"{path} cannot be read: {why.rstrip('.')}.",
        reason="UNREADABLE_FILE",
        violations=(FieldViolation("path", path),),
    )
