"""Confidence intervals of mean scores: the percentile bootstrap over rows.

Owns the resampling; does not know what a score means. An interval covers the choice of test rows and nothing else:
neither another training seed nor another prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from graft.domain.errors import InvalidArgument

LEVEL = 0.95  # what the field reports
RESAMPLES = 10_000  # puts an end within about 1% of the interval's width of where endless resampling would
# Row numbers drawn at a time: 8 MB of them and 8 MB of scores, unless one resample alone has more rows.
_DRAWS_AT_A_TIME = 1_000_000


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval, in the unit of the scores."""

    mean: float
    low: float
    high: float


def interval(scores: Sequence[float], *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The mean score with its percentile bootstrap interval (Efron & Tibshirani 1993, chapter 13).

    Rows that all score the same give an interval without width, since resampling cannot show what it never saw.

    Args:
        scores: one a row.
        level: the share of repeated experiments in which the interval should hold the true mean.
        seed: the same seed and number of rows draw the same rows.

    Raises:
        InvalidArgument: no scores, a score that is not finite, a level outside (0, 1), or no resamples.
    """
    scores_R = np.asarray(scores, dtype=np.float64)
    if scores_R.ndim != 1 or not len(scores_R):
        raise InvalidArgument("A mean needs at least one score.", reason="NO_SCORES")
    if not np.isfinite(scores_R).all():
        row = int(np.flatnonzero(~np.isfinite(scores_R))[0])
        raise InvalidArgument(
            f"The score of row {row} is {scores_R[row]}: it must be finite.", reason="SCORE_NOT_FINITE"
        )
    if not 0 < level < 1:
        raise InvalidArgument(f"level is {level}: it must lie between 0 and 1.", reason="INVALID_LEVEL")
    if resamples < 1:
        raise InvalidArgument(f"resamples is {resamples}: it must be at least 1.", reason="INVALID_RESAMPLES")
    low, high = np.quantile(_resampled_means(scores_R, resamples, seed), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(scores_R.mean()), float(low), float(high))


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


def _resampled_means(scores_R: npt.NDArray[np.float64], resamples: int, seed: int) -> npt.NDArray[np.float64]:
    rows = len(scores_R)
    random = np.random.default_rng(seed)
    at_a_time = max(1, _DRAWS_AT_A_TIME // rows)
    means = np.empty(resamples)
    for start in range(0, resamples, at_a_time):
        part = means[start : start + at_a_time]
        part[:] = scores_R[random.integers(rows, size=(len(part), rows))].mean(axis=1)
    return means
