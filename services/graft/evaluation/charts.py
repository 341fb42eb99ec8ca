"""Where things go on a chart, and how its numbers read.

Owns axes, the loss curve's geometry and the wording of scores; does not know the page that draws them. Positions are
percentages of the plot from its left and top edge, so that a chart fits any width while its text keeps its size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Axis:
    """The values from `low` to `high`, with a tick every `step`."""

    low: float
    high: float
    ticks: tuple[float, ...]
    step: float

    def place(self, value: float) -> float:
        """Percent of the way from `low` to `high`."""
        return round(100 * (value - self.low) / (self.high - self.low), 2)

    def up_to(self, high: float) -> "Axis":
        """The same axis, ended at `high` rather than at the tick after it."""
        return Axis(self.low, high, tuple(tick for tick in self.ticks if tick <= high), self.step)

    def labels(self) -> list[str]:
        """The ticks in plain decimals, as many as the step needs; in powers of ten from a million on."""
        largest = max(map(abs, self.ticks))
        if largest >= 1e6:
            # At least six digits, and enough of them to tell neighbours apart.
            digits = max(6, math.floor(math.log10(largest)) - math.floor(math.log10(self.step)) + 1)
            return [f"{tick:.{digits}g}" for tick in self.ticks]
        decimals = max(0, -math.floor(math.log10(self.step) + 1e-9))
        return [f"{tick:,.{decimals}f}".replace("-", MINUS) for tick in self.ticks]


def axis(low: float, high: float, *, at_most: int = 6, smallest_step: float = 0.0) -> Axis:
    """An axis that holds [low, high] and starts and ends on ticks, at multiples of 1, 2 or 5 times a power of ten.

    Follows Heckbert, "Nice numbers for graph labels" (Graphics Gems, 1990). A range without width gets one.

    Args:
        at_most: ticks, give or take the one that rounding outwards adds.
    """
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        margin = max(smallest_step, abs(low) / 10 or 0.5)
        low, high = low - margin, high + margin
    rough = (high - low) / (at_most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = max(smallest_step, next(nice * power for nice in (1, 2, 5, 10) if nice * power >= rough * (1 - 1e-9)))
    first = math.floor(low / step + 1e-9)
    last = max(first + 1, math.ceil(high / step - 1e-9))
    ticks = tuple(tick * step for tick in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], ticks, step)


@dataclass(frozen=True)
class Scale:
    """How scores in [0, 1] are shown: multiplied by `factor`, with `digits` decimals."""

    factor: int
    digits: int
    unit: str
    difference_unit: str

    def score(self, value: float) -> str:
        """`81.0%` or `0.312`."""
        return f"{value * self.factor:.{self.digits}f}{self.unit}"

    def difference(self, value: float) -> str:
        """Always with its sign, without its unit: `+22.5` or `−0.083`."""
        text = f"{value * self.factor:+.{self.digits}f}"
        return f"{0:.{self.digits}f}" if float(text) == 0 else text.replace("-", MINUS)


PERCENT = Scale(factor=100, digits=1, unit="%", difference_unit=" points")
PLAIN = Scale(factor=1, digits=3, unit="", difference_unit="")


def score_axis(lows: Sequence[float], highs: Sequence[float], scale: Scale, largest: float = 1.0) -> Axis:
    """Around all intervals, from 0 to `largest`: a dot and a whisker show places, not lengths, and need no zero."""
    margin = 0.02 if math.isfinite(largest) else 0.02 * max(highs)
    low, high = max(0.0, min(lows) - margin), min(largest, max(highs) + margin)
    return axis(low * scale.factor, high * scale.factor)


def difference_axis(low: float, high: float, scale: Scale) -> Axis:
    """Around the interval and zero."""
    return axis(min(0.0, low) * scale.factor, max(0.0, high) * scale.factor)


@dataclass(frozen=True)
class LossChart:
    """A loss curve ready to draw.

    Attributes:
        dots: SVG path in a square of 100 by 100, one dot a point.
        line: SVG path of the smoothed curve; empty for a single point.
        window: points a smoothed value is the mean of, away from the ends.
        left_out: points whose loss is not a finite number.
    """

    x: Axis
    y: Axis
    dots: str
    line: str
    window: int
    first: float
    last: float
    left_out: int


def loss_chart(steps: Sequence[int], losses: Sequence[float]) -> LossChart | None:
    """The chart of a loss by optimizer step; `None` if no loss is finite."""
    kept = [(step, loss) for step, loss in zip(steps, losses, strict=True) if math.isfinite(loss)]
    if not kept:
        return None
    first, last = min(step for step, _ in kept), max(step for step, _ in kept)
    x = axis(first, last, smallest_step=1)
    x = x.up_to(last) if first < last else x
    y = axis(min(loss for _, loss in kept), max(loss for _, loss in kept), at_most=5)
    # A tenth of the curve hides the noise of single batches and keeps the shape; odd, so that it is centred.
    reach = len(kept) // 20
    smooth = _centred_means([loss for _, loss in kept], reach)
    places = [(x.place(step), 100 - y.place(loss)) for step, loss in kept]
    dots = "".join(f"M{across:g} {down:g}h.01" for across, down in places)
    line = "L".join(f"{across:g} {100 - y.place(mean):g}" for (across, _), mean in zip(places, smooth, strict=True))
    return LossChart(
        x=x,
        y=y,
        dots=dots,
        line=f"M{line}" if len(kept) > 1 else "",
        window=2 * reach + 1,
        first=smooth[0],
        last=smooth[-1],
        left_out=len(steps) - len(kept),
    )


def _centred_means(values: Sequence[float], reach: int) -> list[float]:
    """Each value's mean with `reach` neighbours on either side, fewer near the ends and as many left as right."""
    means = []
    for at in range(len(values)):
        near = min(reach, at, len(values) - 1 - at)
        part = values[at - near : at + near + 1]
        means.append(sum(part) / len(part))
    return means
