"""Keeps examples on disk, so that a data set may be larger than the memory.

Owns a file without a name, which goes when nobody holds the spool any more or the process ends. Does not know rows,
methods or batches.
"""

import os
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
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


class Spool:
    """Examples in the order in which they were added: 5 bytes a token on disk (in `TMPDIR`), 8 an example in memory."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="graft-examples-")  # noqa: SIM115 - lives as long as the spool
        self._ends = array("Q", [0])
        """Offset in the file at which each example ends."""

    def __len__(self) -> int:
        return len(self._ends) - 1

    def add(self, example: Example) -> None:
        """Raises OSError when the disk is full."""
        self._file.write(array("i", example.token_ids).tobytes())
        self._file.write(bytes(example.loss_mask))
        self._ends.append(self._ends[-1] + TOKEN_BYTES * len(example.token_ids))

    def read(self) -> View[Example]:
        """All examples. None is added after it."""
        self._file.flush()
        return View(len(self), self._at)

    def _at(self, index: int) -> Example:
        start, end = self._ends[index], self._ends[index + 1]
        # Not seek and read: threads share the position.
        stored = os.pread(self._file.fileno(), end - start, start)
        mask_at = (end - start) // TOKEN_BYTES * 4
        return Example(array("i", stored[:mask_at]), stored[mask_at:])
