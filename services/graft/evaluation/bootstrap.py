"""Confidence intervals of means and of any other statistic of rows: the percentile bootstrap.

Owns the resampling; does not know what a score means. An interval covers the choice of test rows and nothing else:
neither another training seed nor another prompt. Shape letters: R rows, B resamples drawn at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from graft.domain.errors import InvalidArgument

LEVEL = 0.95  # what the field reports
RESAMPLES = 10_000  # puts an end within about 1% of the interval's width of where endless resampling would
# Row numbers drawn at a time: 8 MB of them and 8 MB of scores, unless one resample alone has more rows.
_DRAWS_AT_A_TIME = 1_000_000

Statistic = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float64]]
"""From row numbers, shape (B, R), to one value for each of the B samples that they make up."""


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval, in the unit of the scores."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Estimate:
    """A statistic of all rows and its confidence interval, in the statistic's unit."""

    value: float
    low: float
    high: float


def estimate(
    statistic: Statistic, rows: int, *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """A statistic with its percentile bootstrap interval (Efron & Tibshirani 1993, chapter 13).

    For what is no mean over rows (macro-F1, perplexity): each resample is a data set of its own, whose statistic is
    computed afresh. A paired difference is the statistic `lambda drawn: one(drawn) - other(drawn)` (Koehn 2004).

    Args:
        statistic: vectorised over resamples; called with every row once for the value itself.
        rows: how many there are to draw from.
        level: the share of repeated experiments in which the interval should hold the true value.
        seed: the same seed and number of rows draw the same rows.

    Raises:
        InvalidArgument: no rows, a value that is not finite, a level outside (0, 1), or no resamples.
    """
    if rows < 1:
        raise InvalidArgument("A figure needs at least one row.", reason="NO_SCORES")
    if not 0 < level < 1:
        raise InvalidArgument(f"level is {level}: it must lie between 0 and 1.", reason="INVALID_LEVEL")
    if resamples < 1:
        raise InvalidArgument(f"resamples is {resamples}: it must be at least 1.", reason="INVALID_RESAMPLES")
    value = float(statistic(np.arange(rows)[None])[0])
    resampled = _resampled(statistic, rows, resamples, seed)
    if not (np.isfinite(value) and np.isfinite(resampled).all()):
        raise InvalidArgument(
            f"The statistic of all {rows} rows is {value}: it and that of each resample must be finite.",
            reason="SCORE_NOT_FINITE",
        )
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high))


def mean_of(scores: Sequence[float]) -> Statistic:
    """The mean score, as a statistic.

    Raises:
        InvalidArgument: no scores, or one that is not finite.
    """
    scores_R = np.asarray(scores, dtype=np.float64)
    if scores_R.ndim != 1 or not len(scores_R):
        raise InvalidArgument("A mean needs at least one score.", reason="NO_SCORES")
    if not np.isfinite(scores_R).all():
        row = int(np.flatnonzero(~np.isfinite(scores_R))[0])
        raise InvalidArgument(
            f"The score of row {row} is {scores_R[row]}: it must be finite.", reason="SCORE_NOT_FINITE"
        )

    def mean(rows_BR: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        means: npt.NDArray[np.float64] = scores_R[rows_BR].mean(axis=1)
        return means

    return mean


def interval(scores: Sequence[float], *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The mean score with its percentile bootstrap interval, as `estimate` gives it.

    Rows that all score the same give an interval without width, since resampling cannot show what it never saw.

    Args:
        scores: one a row.

    Raises:
        InvalidArgument: no scores, a score that is not finite, or as `estimate`.
    """
    found = estimate(mean_of(scores), len(scores), level=level, resamples=resamples, seed=seed)
    return Interval(found.value, found.low, found.high)


def paired_difference(
    scores: Sequence[float],
    baseline: Sequence[float],
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The mean of `scores - baseline` with its interval; each resample takes the same rows of both (Koehn 2004).

    Pairing removes what makes a row hard for both, so the interval is narrower than that of two separate means.

    Raises:
        InvalidArgument: unequal lengths, or as `interval`.
    """
    if len(scores) != len(baseline):
        raise InvalidArgument(
            f"{len(scores)} scores cannot be paired with {len(baseline)} of the baseline: score the same rows.",
            reason="UNEQUAL_LENGTHS",
        )
    difference = np.asarray(scores, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    return interval(difference.tolist(), level=level, resamples=resamples, seed=seed)


def _resampled(statistic: Statistic, rows: int, resamples: int, seed: int) -> npt.NDArray[np.float64]:
    random = np.random.default_rng(seed)
    at_a_time = max(1, _DRAWS_AT_A_TIME // rows)
    values = np.empty(resamples)
    for start in range(0, resamples, at_a_time):
        part = values[start : start + at_a_time]
        part[:] = statistic(random.integers(rows, size=(len(part), rows)))
    return values
