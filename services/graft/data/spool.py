"""Keeps on disk what is made of a data set's rows, so that it may be larger than the memory.

Owns files without a name, which go when nobody holds what was read of them any more or the process ends. Does not know
rows, methods or batches.
"""

import os
import pickle
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar, overload

from graft.data.rendering import Example

T = TypeVar("T")
TOKEN_BYTES = 5
"""An id of 4 and a byte of the mask."""


class View(Sequence[T]):
    """`length` items, each made when it is asked for and kept by nobody. A slice of it is a tuple."""

    def __init__(self, length: int, at: Callable[[int], T]) -> None:
        self._length = length
        self._at = at

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[T]:
        return map(self._at, range(self._length))

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[T, ...]: ...
    def __getitem__(self, index: int | slice) -> T | tuple[T, ...]:
        chosen = range(self._length)[index]
        return self._at(chosen) if isinstance(chosen, int) else tuple(map(self._at, chosen))


class Records:
    """Byte strings in the order in which they were added: on disk (in `TMPDIR`), 8 bytes each in memory."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="graft-records-")  # noqa: SIM115 - lives as long as the records
        self._ends = array("Q", [0])
        """Offset in the file at which each record ends."""

    def __len__(self) -> int:
        return len(self._ends) - 1

    def add(self, record: bytes) -> None:
        """Raises OSError when the disk is full."""
        self._file.write(record)
        self._ends.append(self._ends[-1] + len(record))

    def read(self, made_of: Callable[[bytes], T]) -> View[T]:
        """What each is made into. None is added after it."""
        self._file.flush()
        return View(len(self), lambda index: made_of(self._at(index)))

    def _at(self, index: int) -> bytes:
        start, end = self._ends[index], self._ends[index + 1]
        # Not seek and read: threads share the position.
        return os.pread(self._file.fileno(), end - start, start)


class Spool:
    """Examples on disk: 5 bytes a token."""

    def __init__(self) -> None:
        self._records = Records()

    def __len__(self) -> int:
        return len(self._records)

    def add(self, example: Example) -> None:
        """Raises OSError when the disk is full."""
        self._records.add(array("i", example.token_ids).tobytes() + bytes(example.loss_mask))

    def read(self) -> View[Example]:
        """All examples. None is added after it."""
        return self._records.read(_example)


def _example(stored: bytes) -> Example:
    mask_at = len(stored) // TOKEN_BYTES * 4
    return Example(array("i", stored[:mask_at]), stored[mask_at:])


def spooled(items: Iterable[T]) -> View[T]:
    """The items on disk, each read as an equal one. Raises OSError when the disk is full."""
    records = Records()
    for item in items:
        # Of this process's own making, in a file that no other can open.
        records.add(pickle.dumps(item, pickle.HIGHEST_PROTOCOL))
    return records.read(pickle.loads)
