"""Recognises and validates a data set file, row by row, in memory that does not grow with the file.

Owns the count of bad rows and what is told of them. Which format a row has is in `graft.data.layouts`, what a good one
is in `graft.data.rows`, how files are taken apart in `graft.data.reading`. Does not know where files are kept.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graft.data.labels import FieldValues
from graft.data.layouts import LAYOUTS, Candidate, Fault, candidates, shown
from graft.data.reading import BOM, HEAD_BYTES, MAX_ROW_BYTES, Container, container_of, read_rows, records, unreadable
from graft.data.rows import row_faults
from graft.data.tasks.rows import FORMATS
from graft.domain.errors import FieldViolation, InvalidArgument
from graft.domain.resources import DatasetFormat

__all__ = ["FileReport", "FileValidator", "read_rows", "validate_file"]

REPORTED_ROWS = 20
REPORTED_KEYS = 20
READ_BYTES = 1024 * 1024


@dataclass(frozen=True)
class FileReport:
    """A file in which every row is good."""

    format: DatasetFormat
    container: Container
    row_count: int
    size_bytes: int
    digest: str
    """`sha256:<hex>` of the bytes."""
    ignored: tuple[str, ...] = ()
    """Keys that the declared format does not read, 20 at most."""
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Of rows that a task's template reads, as `graft.data.labels.FieldValues.found`; empty of all others."""


class FileValidator:
    """Validates a file that arrives in chunks of any size.

    JSONL is validated as it comes. CSV and Parquet are read from the file where the chunks were written, in `finish`.
    Blank lines are skipped; CRLF and a BOM are accepted.
    """

    def __init__(self, declared: DatasetFormat | None = None) -> None:
        self.declared = declared
        self._hash = hashlib.sha256()
        self._size_bytes = 0
        self._head: bytearray | None = bytearray()
        """The first bytes, until they tell what the file is."""
        self._container: Container | None = None
        self._rows = _Rows(declared)
        self._jsonl = _Jsonl(self._rows)

    def feed(self, chunk: bytes) -> None:
        """Takes the next bytes. Remembers faults; raises nothing."""
        self._hash.update(chunk)
        self._size_bytes += len(chunk)
        if self._head is not None:
            self._head += chunk
            if len(self._head) >= HEAD_BYTES:
                self._begin()
        elif self._container is Container.JSONL:
            self._jsonl.feed(chunk)

    def finish(self, path: Path | None = None) -> FileReport:
        """The report. `path` holds the same bytes; a JSONL file needs none.

        Raises InvalidArgument: BAD_DATASET with the count of all bad rows and the first 20, AMBIGUOUS_DATASET with the
        formats that it may have.
        """
        if self._head is not None:
            self._begin()
        if self._container is None:
            raise unreadable("The file is neither JSONL, CSV nor Parquet in UTF-8; nothing was stored.")
        if self._container is Container.JSONL:
            self._jsonl.finish()
        else:
            if path is None:
                raise ValueError(f"a {self._container} file is validated from its path")
            for number, record in enumerate(records(path, self._container), start=1):
                self._rows.take(record, f"row {number}")
        format = self._rows.finish("lines" if self._container is Container.JSONL else "rows")
        return FileReport(
            format=format,
            container=self._container,
            row_count=self._rows.count,
            size_bytes=self._size_bytes,
            digest=f"sha256:{self._hash.hexdigest()}",
            ignored=tuple(self._rows.ignored)[:REPORTED_KEYS],
            labels=self._rows.values.found(),
        )

    def _begin(self) -> None:
        assert self._head is not None
        head, self._head = bytes(self._head), None
        self._container = container_of(head)
        if self._container is Container.JSONL:
            self._jsonl.feed(head)


def validate_file(
    path: Path, declared: DatasetFormat | None = None, progress: Callable[[int], None] = lambda _: None
) -> FileReport:
    """Validates a file on disk; `progress` is told the bytes read so far.

    Raises as `FileValidator.finish`, and OSError when it cannot be read.
    """
    validator = FileValidator(declared)
    read_bytes = 0
    with open(path, "rb") as file:
        while chunk := file.read(READ_BYTES):
            validator.feed(chunk)
            read_bytes += len(chunk)
            progress(read_bytes)
    return validator.finish(path)


class _Rows:
    """Counts rows, and faults of those that are bad."""

    def __init__(self, declared: DatasetFormat | None) -> None:
        self._declared = declared
        self._format = declared
        self._ambiguous: tuple[str, list[Candidate]] | None = None
        self._bad = 0
        self._violations: list[FieldViolation] = []
        self.count = 0
        self.places = 0
        """Lines or rows, those without content too."""
        self.ignored: dict[str, None] = {}
        self.values = FieldValues()

    def take(self, row: Mapping[str, Any] | Fault, where: str) -> None:
        """A row, or what is wrong with it."""
        self.places += 1
        self.count += 1
        faults = [row] if isinstance(row, tuple) else self._faults(row, where)
        if not faults:
            if self._format in FORMATS and not isinstance(row, tuple):
                self.values.take(row)
            return
        self._bad += 1
        if self._bad <= REPORTED_ROWS:
            field, description = faults[0]
            more = f" (and {len(faults) - 1} more in this {where.split()[0]})" if len(faults) > 1 else ""
            self._violations.append(FieldViolation(where + (f": {field}" if field else ""), description + more))

    def blank(self) -> None:
        """A line without a row."""
        self.places += 1

    def finish(self, places: str) -> DatasetFormat:
        """The format. Raises InvalidArgument; `places` is what rows are called in the message."""
        if self._ambiguous is not None:
            raise _ambiguous(*self._ambiguous)
        if self._bad:
            first = "; ".join(f"{violation.field}: {violation.description}" for violation in self._violations)
            raise InvalidArgument(
                f"{self._bad} of {self.places} {places} are bad; nothing was stored. First: {first}",
                reason="BAD_DATASET",
                metadata={"bad_lines": str(self._bad), "lines": str(self.places)},
                violations=tuple(self._violations),
            )
        if self._format is None or not self.count:
            raise InvalidArgument(
                "The file has no rows. Write one JSON object a line, or a header and a row of CSV.",
                reason="BAD_DATASET",
                metadata={"bad_lines": "0"},
                violations=(FieldViolation("line 1", "the file has no rows"),),
            )
        return self._format

    def _faults(self, row: Mapping[str, Any], where: str) -> list[Fault]:
        if self._ambiguous is not None:
            return []  # the first such row has said it all
        if self._declared is not None:
            layout = LAYOUTS[self._declared]
            if not layout.open and len(self.ignored) < REPORTED_KEYS:
                self.ignored |= {shown(key): None for key in row if key not in layout.keys}
            return row_faults(row, self._declared, declared=True)
        if self._format is not None and LAYOUTS[self._format].fits(row):
            return row_faults(row, self._format)  # as nearly all rows are: looking for other formats takes longer
        found = candidates(row)
        own = next((one for one in found if one.format is self._format), None)
        if self._format is None:
            if not found:
                keys = ", ".join(shown(key) for key in sorted(row)[:5]) or "none"
                return [("", f"has none of the known formats ({_KNOWN}); its keys: {keys}")]
            if len(found) > 1:
                self._ambiguous = (where, found)
                return []
            self._format = found[0].format
        elif own is None and not self._falls_short(row, found):
            kind = f"a {found[0].format} row" if found else "no such row"
            return [("", f"is {kind} in a {self._format} file; one file has one layout")]
        elif own is not None and len(found) > 1:
            return [("", f"may be {_or(found)}; declare the format of the file to have it read so")]
        return row_faults(row, self._format)

    def _falls_short(self, row: Mapping[str, Any], found: list[Candidate]) -> bool:
        """Whether a row that looks like another format's is one of this file's that lacks something."""
        if self._format is DatasetFormat.GRADED_PROMPTS:
            return any(one.missing for one in found)  # a prompt alone: nothing to judge it by is allowed
        own = LAYOUTS[self._format] if self._format else None
        graded = [one.format for one in found] in ([], [DatasetFormat.GRADED_PROMPTS])
        return own is not None and graded and not own.keys.isdisjoint(row)


_KNOWN = ", ".join(format for format in LAYOUTS if format is not DatasetFormat.FIELDS)


def _or(found: list[Candidate]) -> str:
    *first, last = [candidate.told() for candidate in found]
    return f"{', '.join(first)} or {last}"


def _ambiguous(where: str, found: list[Candidate]) -> InvalidArgument:
    names = ", ".join(candidate.format for candidate in found)
    return InvalidArgument(
        f"{where} may be {_or(found)}; nothing was stored. Declare which it is: `--format {found[0].format}` of the "
        f"command, `format` of an upload; one of {names}.",
        reason="AMBIGUOUS_DATASET",
        metadata={"candidates": names, "where": where},
        violations=(FieldViolation(where, f"may be {_or(found)}"),),
    )


class _Jsonl:
    """Lines out of chunks, and rows out of lines."""

    def __init__(self, rows: _Rows) -> None:
        self._rows = rows
        self._rest = bytearray()
        self._skipping = False

    def feed(self, chunk: bytes) -> None:
        first, *others = chunk.split(b"\n")
        # Grown in place: a long line in small pieces would otherwise be copied once a piece.
        self._rest += first
        for other in others:
            line, self._rest = bytes(self._rest), bytearray(other)
            self._end_line(line)
        if len(self._rest) > MAX_ROW_BYTES:
            # The rest of this line is dropped as it comes, so that one endless line cannot fill the memory.
            self._skipping = True
            del self._rest[1:]

    def finish(self) -> None:
        if self._rest:
            self._end_line(bytes(self._rest))
            self._rest.clear()

    def _end_line(self, line: bytes) -> None:
        where = f"line {self._rows.places + 1}"
        if self._skipping or len(line) > MAX_ROW_BYTES:
            self._skipping = False
            self._rows.take(("", f"is longer than {MAX_ROW_BYTES} bytes"), where)
            return
        if not self._rows.places:
            line = line.removeprefix(BOM)
        line = line.rstrip(b"\r")
        if line.strip():
            self._rows.take(_parsed(line), where)
        else:
            self._rows.blank()


def _parsed(line: bytes) -> dict[str, Any] | Fault:
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        return "", f"is not UTF-8 (byte {error.start})"
    except _DuplicateKey as error:
        return shown(error.key), "occurs twice"
    except json.JSONDecodeError as error:
        return "", f"is not JSON: {error.msg} at column {error.colno}"
    except ValueError:
        # The one that is left: Python reads no integer of more than 4300 digits.
        return "", "has a number with too many digits"
    except RecursionError:
        return "", "is nested too deeply"
    return row if isinstance(row, dict) else ("", "is not a JSON object")


class _DuplicateKey(ValueError):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for key, value in pairs:
        if key in row:
            raise _DuplicateKey(key)
        row[key] = value
    return row
