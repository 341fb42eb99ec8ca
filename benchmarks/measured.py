"""One figure of a benchmark before it stands in a report, and stop-watches for coroutines."""

import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from benchmarks.common import Report, console

T = TypeVar("T")


@dataclass(frozen=True)
class Measured:
    """A value a round."""

    figure: str
    unit: str
    values: list[float]


def add(report: Report, contestant: str, one: Measured, size: int = 0) -> None:
    """Into the report, with the size in the figure's name unless it is 0, and on the screen at once."""
    figure = one.figure + (f" @ {size:,}" if size else "")
    report.figure(figure, one.unit, contestant, one.values)
    console.print(f"{contestant}: {figure}: {statistics.median(one.values):.4g} {one.unit}", markup=False)


async def seconds_of(call: Callable[[], Awaitable[Any]]) -> float:
    """Of one call."""
    started = time.perf_counter()
    await call()
    return time.perf_counter() - started


async def median_milliseconds(call: Callable[[T], Awaitable[Any]], given: Sequence[T]) -> float:
    """Of a call each, one after the other."""
    return statistics.median([await seconds_of(partial(call, item)) for item in given]) * 1000
