"""Reads the rows of a JSONL, CSV or Parquet file one at a time, in memory that does not grow with the file.

Owns how a file is told from its first bytes and taken apart. Does not know formats: a row is a mapping of fields.
"""

import csv
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any

from graft.data.layouts import Fault, shown
from graft.domain.errors import FailedPrecondition, FieldViolation, InvalidArgument

MAX_ROW_BYTES = 1024 * 1024
"""A row beyond it exceeds every context by far (2048 tokens are some 8 KB of English)."""
HEAD_BYTES = 4096
"""So many first bytes tell what a file is, whatever comes later."""
BATCH_ROWS = 64
"""Rows of a Parquet file that become Python objects at a time."""
_BINARY = re.compile(rb"[\x00-\x08\x0e-\x1f]")
"""Control characters that no text holds and every archive or picture does."""
_SURROGATE = re.compile("[\ud800-\udfff]")
"""What a byte that is not UTF-8 is decoded to."""
BOM = b"\xef\xbb\xbf"

Record = dict[str, Any] | Fault
"""A row, or what is wrong with it."""


class Container(StrEnum):
    """What a file is, and how its name ends when stored."""

    JSONL = "jsonl"
    CSV = "csv"
    PARQUET = "parquet"


def container_of(head: bytes) -> Container | None:
    """What a file that begins so is; None when it is none of them. `head` has HEAD_BYTES, or is all there is."""
    if head.startswith(b"PAR1"):
        return Container.PARQUET
    text = head.removeprefix(BOM).lstrip()
    # JSON that is no object is still told as a wrong line rather than as a strange header.
    if not text or text[:1] in b"{[":
        return Container.JSONL
    return None if _BINARY.search(text) else Container.CSV


@contextmanager
def naming_row(row_number: int) -> Iterator[None]:
    """Says of each InvalidArgument which row, counted from 1, it is about."""
    try:
        yield
    except InvalidArgument as error:
        raise InvalidArgument(
            f"Row {row_number}: {error.message}",
            reason=error.reason,
            metadata=error.metadata,
            violations=(FieldViolation(f"row {row_number}", error.message),),
        ) from None


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file that was validated before, one at a time.

    Raises InvalidArgument (BAD_DATASET) for a row that cannot be read: the file was changed since.
    """
    with open(path, "rb") as file:
        container = container_of(file.read(HEAD_BYTES))
    if container is None:
        raise unreadable(f"{path.name} is neither JSONL, CSV nor Parquet.")
    if container is Container.JSONL:
        yield from _jsonl_rows(path)
        return
    for number, record in enumerate(records(path, container), start=1):
        if isinstance(record, tuple):
            raise unreadable(f"{path.name}, row {number}: {' '.join(filter(None, record))}")
        yield record


def _jsonl_rows(path: Path) -> Iterator[dict[str, Any]]:
    number = 0
    with open(path, encoding="utf-8-sig", newline="\n") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise unreadable(f"{path.name}, line {number}: is not a JSON object.")
                    yield row
        except UnicodeDecodeError:  # some lines are read ahead
            raise unreadable(f"{path.name}, after line {number}: is not UTF-8.") from None
        except (ValueError, RecursionError) as error:
            raise unreadable(f"{path.name}, line {number}: is not JSON: {error}.") from None


def records(path: Path, container: Container) -> Iterator[Record]:
    """The rows of a CSV or Parquet file, or in the place of one what is wrong with it. Raises InvalidArgument for a
    file of which nothing can be read."""
    return _csv_records(path) if container is Container.CSV else _parquet_records(path)


def unreadable(message: str) -> InvalidArgument:
    """A file that is none, as a whole."""
    return InvalidArgument(
        message, reason="BAD_DATASET", metadata={"bad_lines": "0"}, violations=(FieldViolation("file", message),)
    )


# CSV (RFC 4180)


class _TooLong(Exception):
    """A record is longer than MAX_ROW_BYTES: from there on nobody can tell where the next begins."""


class _Lines:
    """Lines of a file for the csv module, never longer than a row may be."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 - closed by the reader of the records
        if self._file.read(len(BOM)) != BOM:
            self._file.seek(0)
        self.record_bytes = 0
        """Read since it was last set to 0."""

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._file.readline(MAX_ROW_BYTES + 1)
        if not line:
            raise StopIteration
        self.record_bytes += len(line)
        if self.record_bytes > MAX_ROW_BYTES:
            raise _TooLong
        return line.decode("utf-8", "surrogateescape")

    def close(self) -> None:
        self._file.close()


def _csv_records(path: Path) -> Iterator[Record]:
    csv.field_size_limit(MAX_ROW_BYTES)  # the process's: 128 KiB otherwise, less than a long document
    lines = _Lines(path)
    try:
        reader = csv.reader(lines, strict=True)
        try:
            header = _header(next(filter(None, reader)))
        except (csv.Error, _TooLong) as error:
            raise unreadable(f"The first row is no header of columns: {error or 'it is too long'}.") from None
        while True:
            lines.record_bytes = 0
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield "", f"is not CSV: {error} (line {reader.line_num})"
                continue
            except _TooLong:
                what = f"is longer than {MAX_ROW_BYTES} bytes (line {reader.line_num}); what follows was not read."
                yield "", f"{what} Is a quotation mark missing?"
                return
            if cells:
                yield _csv_row(header, cells)
    finally:
        lines.close()


def _header(names: list[str]) -> list[str]:
    names = [name.strip() for name in names]
    seen: set[str] = set()
    for name in names:
        if not name:
            raise unreadable("The header has a column without a name. Give every column a name in the first row.")
        if name in seen:
            raise unreadable(f"The header names the column `{name[:80]}` twice.")
        seen.add(name)
    for separator, called in ((";", "semicolons"), ("\t", "tabs")):
        if len(names) == 1 and separator in names[0]:
            raise unreadable(f"Columns are separated by {called}; write commas between them (RFC 4180).")
    return names


def _csv_row(header: list[str], cells: list[str]) -> Record:
    if len(cells) != len(header):
        return "", f"has {len(cells)} columns where the header has {len(header)}"
    row: dict[str, Any] = {}
    for name, cell in zip(header, cells, strict=True):
        if not cell.isascii() and _SURROGATE.search(cell):
            return shown(name), "is not UTF-8"
        if cell.startswith(("[{", '{"messages"')) and (nested := _nested(cell)) is not None:
            row[name] = nested
            continue
        if cell or name not in ("context", "input", "tools"):
            row[name] = cell
    return row


def _nested(cell: str) -> Any:
    """What a cell holds as JSON: messages, turns, tools, or the object around OpenAI's messages. None for any other
    text, JSON to learn from included."""
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict):
        return value if isinstance(value.get("messages"), list) else None
    marks = ("role", "from", "function")
    return value if all(isinstance(item, dict) and any(mark in item for mark in marks) for item in value) else None


# Parquet


def _parquet_records(path: Path) -> Iterator[Record]:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        raise FailedPrecondition(
            "Parquet files need pyarrow, which is not installed. Install it with `pip install pyarrow`, or use JSONL.",
            reason="PYARROW_MISSING",
        ) from None
    try:
        # Unbuffered, a whole row group would be read at once, and there may be only one.
        with parquet.ParquetFile(path, buffer_size=MAX_ROW_BYTES, pre_buffer=False) as file:
            names = file.schema_arrow.names
            if len(set(names)) != len(names):
                raise unreadable("Two columns have one name.")
            for batch in file.iter_batches(batch_size=BATCH_ROWS, use_threads=False):
                for row in batch.to_pylist():
                    yield _plain(row) if _size(row) <= MAX_ROW_BYTES else ("", f"is longer than {MAX_ROW_BYTES} bytes")
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise unreadable(f"The Parquet file is damaged: {str(error).splitlines()[0]}") from None


def _plain(value: Any) -> Any:
    """Without nulls: a Parquet struct has every field in every row, those that a row does not have too."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def _size(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    if isinstance(value, list):
        return sum(map(_size, value))
    return len(value) if isinstance(value, str | bytes) else 8
