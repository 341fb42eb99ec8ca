import math
from itertools import pairwise

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from graft.evaluation.charts import PERCENT, PLAIN, axis, loss_chart

VALUES = st.floats(-1e6, 1e6)


@given(VALUES, VALUES, st.integers(3, 10))
@example(-1_000_000.0, -999_999.0, 3)
def test_an_axis_holds_its_range_and_ends_on_ticks(one: float, other: float, at_most: int) -> None:
    low, high = sorted((one, other))
    assume(high - low > 1e-6)
    found = axis(low, high, at_most=at_most)
    slack = found.step * 1e-6
    assert found.ticks[0] - slack <= low
    assert high <= found.ticks[-1] + slack
    assert 2 <= len(found.ticks) <= at_most + 1
    assert (found.place(found.ticks[0]), found.place(found.ticks[-1])) == (0, 100)
    assert len(set(found.labels())) == len(found.ticks)


@given(VALUES)
def test_an_axis_of_one_value_has_room_on_both_sides(value: float) -> None:
    assert 0 < axis(value, value).place(value) < 100


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0.0, 1.0, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (43.0, 92.0, ["40", "50", "60", "70", "80", "90", "100"]),
        (-0.011, 0.057, ["−0.02", "0.00", "0.02", "0.04", "0.06"]),
        (0.0, 12_000.0, ["0", "5,000", "10,000", "15,000"]),
        (0.0, 3e30, ["0", "1e+30", "2e+30", "3e+30"]),
    ],
)
def test_ticks_are_round_and_read_in_as_many_decimals_as_they_need(low: float, high: float, labels: list[str]) -> None:
    assert axis(low, high).labels() == labels


def test_steps_are_whole_and_the_axis_ends_with_the_training() -> None:
    chart = loss_chart([1, 2, 3], [3.0, 2.0, 1.0])
    assert chart is not None
    assert chart.x.labels() == ["1", "2", "3"]
    chart = loss_chart(range(1, 161), [1.0] * 160)
    assert chart is not None
    assert (chart.x.labels(), chart.x.place(160)) == (["0", "50", "100", "150"], 100)


def test_a_score_reads_in_its_unit_and_a_difference_with_its_sign() -> None:
    assert (PERCENT.score(0.81), PLAIN.score(0.3124)) == ("81.0%", "0.312")
    assert (PERCENT.difference(0.225), PERCENT.difference(-0.05), PLAIN.difference(-0.0834)) == (
        "+22.5",
        "−5.0",
        "−0.083",
    )


def test_a_difference_that_rounds_to_nothing_has_no_sign() -> None:
    assert [PERCENT.difference(value) for value in (0.0, 1e-5, -1e-5)] == ["0.0"] * 3
    assert PLAIN.difference(-1e-5) == "0.000"


def _points(path: str) -> list[list[float]]:
    return [[float(number) for number in point.split()] for point in path.removeprefix("M").split("L")]


def test_smoothing_keeps_a_straight_line_straight_up_to_its_ends() -> None:
    chart = loss_chart(range(1, 101), [3 - step / 50 for step in range(1, 101)])
    assert chart is not None
    assert chart.window == 11
    assert (chart.first, chart.last) == pytest.approx((2.98, 1.0))
    points = _points(chart.line)
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(points)]
    assert len(points) == 100
    assert slopes == pytest.approx([slopes[0]] * 99, rel=0.05)  # places have two decimals


def test_smoothing_takes_the_noise_out() -> None:
    chart = loss_chart(range(200), [2 + (-1) ** step for step in range(200)])
    assert chart is not None
    inner = [chart.y.ticks[-1] - down / 100 * (chart.y.high - chart.y.low) for _, down in _points(chart.line)[10:-10]]
    assert max(abs(value - 2) for value in inner) < 0.1


def test_a_single_point_is_a_dot_without_a_line() -> None:
    chart = loss_chart([5], [2.5])
    assert chart is not None
    assert (chart.dots.count("M"), chart.line, chart.window) == (1, "", 1)


def test_losses_that_are_not_finite_are_left_out_and_counted() -> None:
    chart = loss_chart([1, 2, 3, 4], [2.0, math.nan, math.inf, 1.0])
    assert chart is not None
    assert (chart.left_out, chart.dots.count("M")) == (2, 2)
    assert "n" not in chart.dots + chart.line
    assert loss_chart([1], [math.nan]) is None
    assert loss_chart([], []) is None
