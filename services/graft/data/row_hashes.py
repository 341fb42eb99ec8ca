"""Which rows of a file are equal, or ask the same, by hashes of them that are kept on disk.

Owns an SQLite database without a name, which goes with the object; a few megabytes of it are in memory, however many
rows there are. Does not know rows. Two of ten million different ones share a hash of 64 bits with a chance of 3 in a
million.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from graft.domain.errors import ResourceExhausted
from graft.domain.reports import FoundRows

FIRST_ROWS = 5
_ROWS_AT_A_TIME = 1000

_OPEN = """
PRAGMA journal_mode=OFF;
PRAGMA synchronous=OFF;
PRAGMA temp_store=FILE;
CREATE TABLE rows (number INTEGER PRIMARY KEY, whole INTEGER, asked INTEGER, answer INTEGER);
BEGIN;
"""
# SQLite's cache has 2 MB by itself: with eight times as much 600,000 rows took no less time. Through an index rows come
# sorted, so that no group is held in memory.
_BY_ASKED = "CREATE INDEX IF NOT EXISTS by_asked ON rows (asked, answer)"
_DUPLICATES = (
    "CREATE INDEX IF NOT EXISTS by_whole ON rows (whole)",
    "SELECT total(n - 1) FROM (SELECT count(*) AS n FROM rows GROUP BY whole)",
    "SELECT number FROM (SELECT whole, min(number) AS first FROM rows GROUP BY whole HAVING count(*) > 1) AS twins "
    "JOIN rows ON rows.whole = twins.whole AND number > first ORDER BY number LIMIT ?",
)
_CONFLICTS = (
    _BY_ASKED,
    "SELECT total(n) FROM (SELECT count(*) AS n FROM rows GROUP BY asked HAVING min(answer) <> max(answer))",
    "SELECT number FROM (SELECT asked FROM rows GROUP BY asked HAVING min(answer) <> max(answer)) AS disputed "
    "JOIN rows ON rows.asked = disputed.asked ORDER BY number LIMIT ?",
)


class RowHashes:
    """A context manager: `add` each row, then ask. Raises ResourceExhausted (DISK_FULL)."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None)
        self._database.executescript(_OPEN)
        self._waiting: list[tuple[int, int, int, int]] = []
        self._count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def __len__(self) -> int:
        return self._count

    def add(self, whole: int, asked: int, answer: int) -> None:
        """The next row's hashes, signed and of 64 bits: of all of it, of its input and of its answer."""
        self._count += 1
        self._waiting.append((self._count, whole, asked, answer))
        if len(self._waiting) == _ROWS_AT_A_TIME:
            self._write()

    def duplicates(self) -> FoundRows:
        """Rows that are equal to an earlier one."""
        return self._found(*_DUPLICATES)

    def conflicts(self) -> FoundRows:
        """Rows whose input has another answer elsewhere."""
        return self._found(*_CONFLICTS)

    def leaked(self, held_out: "RowHashes") -> FoundRows:
        """Rows of `held_out` whose input is here too."""
        self._write()
        held_out._write()
        count = 0
        first: list[int] = []
        with _full_disk_told():
            self._database.execute(_BY_ASKED)
            for number, asked in held_out._database.execute("SELECT number, asked FROM rows ORDER BY number"):
                if self._database.execute("SELECT 1 FROM rows WHERE asked = ? LIMIT 1", (asked,)).fetchone():
                    count += 1
                    if count <= FIRST_ROWS:
                        first.append(number)
        return FoundRows(count, tuple(first))

    def _found(self, index: str, count: str, first: str) -> FoundRows:
        self._write()
        with _full_disk_told():
            self._database.execute(index)
            (found,) = self._database.execute(count).fetchone()
            numbers = self._database.execute(first, (FIRST_ROWS,)).fetchall() if found else []
        return FoundRows(int(found), tuple(number for (number,) in numbers))

    def _write(self) -> None:
        with _full_disk_told():
            self._database.executemany("INSERT INTO rows VALUES (?, ?, ?, ?)", self._waiting)
        self._waiting.clear()


@contextmanager
def _full_disk_told() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorname not in ("SQLITE_FULL", "SQLITE_IOERR_WRITE"):
            raise
        raise ResourceExhausted(
            "The disk for temporary files is full: comparing rows takes some 80 bytes of it for each. Free space "
            "there, or set TMPDIR to a folder on another disk.",
            reason="DISK_FULL",
        ) from error
