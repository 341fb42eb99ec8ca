import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.domain.errors import InvalidArgument
from graft.evaluation import bootstrap
from graft.evaluation.bootstrap import Interval, interval, paired_difference

SCORES = st.lists(st.floats(0, 1), min_size=1, max_size=40)
PAIRS = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=40)
ROUNDING = 1e-12  # sums of at most 40 numbers of at most 1, in two orders


@given(SCORES)
def test_the_interval_holds_the_mean_and_lies_within_the_scores(scores: list[float]) -> None:
    found = interval(scores, resamples=500)
    assert found.mean == pytest.approx(sum(scores) / len(scores))
    assert found.low - ROUNDING <= found.mean <= found.high + ROUNDING
    assert min(scores) - ROUNDING <= found.low <= found.high <= max(scores) + ROUNDING


@given(st.floats(0, 1), st.integers(1, 40))
def test_rows_that_all_score_the_same_have_an_interval_without_width(score: float, rows: int) -> None:
    found = interval([score] * rows, resamples=100)
    assert found.low == found.high == pytest.approx(score)


@given(PAIRS)
def test_swapping_the_two_turns_the_difference_round(pairs: list[tuple[float, float]]) -> None:
    scores, baseline = zip(*pairs, strict=True)
    there = paired_difference(scores, baseline, resamples=200)
    back = paired_difference(baseline, scores, resamples=200)
    assert (back.mean, back.low, back.high) == pytest.approx((-there.mean, -there.high, -there.low), abs=ROUNDING)


@given(PAIRS)
def test_a_difference_is_the_difference_of_the_means(pairs: list[tuple[float, float]]) -> None:
    scores, baseline = zip(*pairs, strict=True)
    found = paired_difference(scores, baseline, resamples=1).mean
    assert found == pytest.approx(
        interval(scores, resamples=1).mean - interval(baseline, resamples=1).mean, abs=ROUNDING
    )


def _coverage(level: float) -> float:
    """The share of 600 experiments of 80 rows each, true mean 0.7, whose interval holds it."""
    random = np.random.default_rng(3)
    held = 0
    for seed in range(600):
        found = interval(random.binomial(1, 0.7, size=80).tolist(), level=level, resamples=1000, seed=seed)
        held += found.low <= 0.7 <= found.high
    return held / 600


def test_about_95_of_100_intervals_hold_the_true_mean() -> None:
    # Two standard errors of a share of 600 are 0.018; the percentile bootstrap falls a little short by design.
    assert 0.92 <= _coverage(0.95) <= 0.97


def test_a_lower_level_holds_it_less_often() -> None:
    assert 0.75 <= _coverage(0.80) <= 0.85


def test_the_interval_agrees_with_the_normal_approximation_on_many_rows() -> None:
    scores = np.random.default_rng(1).random(4000)
    half = 1.96 * scores.std() / np.sqrt(len(scores))
    found = interval(scores.tolist())
    assert (found.low, found.high) == pytest.approx((scores.mean() - half, scores.mean() + half), abs=half * 0.05)


def test_pairing_removes_what_is_hard_for_both() -> None:
    random = np.random.default_rng(2)
    hard = random.random(300)
    scores, baseline = (hard * 0.9 + 0.1).tolist(), (hard * 0.9).tolist()
    paired = paired_difference(scores, baseline)
    alone = interval(scores)
    assert (paired.low, paired.high) == pytest.approx((0.1, 0.1))
    assert alone.high - alone.low > 0.05


def test_the_seed_decides_the_interval() -> None:
    scores = np.random.default_rng(5).random(50).tolist()
    assert interval(scores, seed=1) == interval(scores, seed=1)
    assert interval(scores, seed=1) != interval(scores, seed=2)


def test_working_in_parts_changes_nothing_but_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.random.default_rng(5).random(50).tolist()
    whole = interval(scores, resamples=1000)
    monkeypatch.setattr(bootstrap, "_DRAWS_AT_A_TIME", 50 * 7)
    assert interval(scores, resamples=1000) == whole


def test_more_rows_than_are_drawn_at_a_time_still_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "_DRAWS_AT_A_TIME", 10)
    assert interval([0.5] * 25, resamples=20) == Interval(0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("scores", "level", "resamples", "reason"),
    [
        ([], 0.95, 10, "NO_SCORES"),
        ([0.0, float("nan")], 0.95, 10, "SCORE_NOT_FINITE"),
        ([0.0, float("inf")], 0.95, 10, "SCORE_NOT_FINITE"),
        ([0.0], 95, 10, "INVALID_LEVEL"),
        ([0.0], 0.0, 10, "INVALID_LEVEL"),
        ([0.0], 0.95, 0, "INVALID_RESAMPLES"),
    ],
)
def test_what_has_no_interval_is_refused(scores: list[float], level: float, resamples: int, reason: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        interval(scores, level=level, resamples=resamples)
    assert error.value.reason == reason


def test_a_difference_needs_the_same_rows() -> None:
    with pytest.raises(InvalidArgument, match=r"2 scores .* 1 of the baseline"):
        paired_difference([0.0, 1.0], [0.0])
