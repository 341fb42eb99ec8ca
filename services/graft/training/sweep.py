"""A search over learning rates and ranks: its grid, and what its trials have come to. Knows neither Ray nor torch.

`graft.training.search` runs the trials and decides, by ASHA, which of them to end early.
"""

import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from graft.domain.errors import KINDS, GraftError, Internal
from graft.domain.jobs import Resolved, Sweep

MOST_TRIALS = 16
"""Trials of a grid that is not told how many: each pays a worker's start, some twenty seconds on a CPU."""
FACTOR = 3.0
"""Between neighbours of a derived grid of learning rates: about half an order of magnitude."""
MEASUREMENTS = 4
"""Of the held-out loss in a trial: a first one after a quarter of the steps tells a rate that does not learn."""
REDUCTION_FACTOR = 3.0
"""ASHA's eta. Li et al. 2018 (arXiv:1810.05934) use 4; with a handful of trials that would end all but one."""

Tells = list[tuple[str, dict[str, Any]]]


@dataclass(frozen=True)
class Trial:
    """One combination. `number` counts from 1."""

    number: int
    learning_rate: float
    rank: int
    alpha: float

    def __str__(self) -> str:
        return f"learning rate {self.learning_rate:g}, rank {self.rank}"


@dataclass(frozen=True)
class SearchSpec:
    """What a sweep's run is told, with every value concrete."""

    trials: tuple[Trial, ...]
    grace_steps: int
    """No trial is ended before."""
    reduction_factor: float
    max_concurrent_trials: int


def settle_sweep(sweep: Sweep, resolved: Sequence[Resolved]) -> tuple[Resolved, ...]:
    """`resolved` of a job without its sweep, with the sweep's own values; what is swept has its first value for now."""
    before = {item.name: item for item in resolved}
    own: list[Resolved] = []

    def settle(name: str, given: Any, value: Any, reason: str) -> Any:
        own.append(Resolved(f"sweep.{name}", given or value, not given, "Given by the job." if given else reason))
        return given or value

    rate, rank = before["learning_rate"].value, before["lora.rank"].value
    if not isinstance(rate, int | float) or not isinstance(rank, int | float):
        raise TypeError("A learning rate and a rank are numbers.")
    below, above = (float(f"{rate * factor:.2g}") for factor in (1 / FACTOR, FACTOR))
    usual = dict.fromkeys([below, rate, min(above, 1.0)])
    rates = settle(
        "learning_rates",
        list(sweep.learning_rates),
        [rate] if sweep.ranks else list(usual),
        "Only ranks are swept: 1 value." if sweep.ranks else f"{rate:g}, and {FACTOR:g} times less and more.",
    )
    ranks = settle("ranks", list(sweep.ranks), [int(rank)], "Only learning rates are swept: 1 value.")
    size = len(rates) * len(ranks)
    settle(
        "max_trials",
        min(sweep.max_trials, size),
        min(size, MOST_TRIALS),
        f"{len(rates)} × {len(ranks)} combinations; of more than {MOST_TRIALS}, so many are drawn by the seed.",
    )
    total_steps = int(_number(before["max_steps"]))
    if before["eval_steps"].derived:
        every = max(1, math.ceil(total_steps / MEASUREMENTS))
        reason = f"{MEASUREMENTS} measurements in {total_steps} steps: trials are judged by them."
        before["eval_steps"] = Resolved("eval_steps", every, True, reason)
    settle(
        "grace_steps",
        sweep.grace_steps,
        int(_number(before["eval_steps"])) or max(1, math.ceil(total_steps / MEASUREMENTS)),
        f"The first measurement of {MEASUREMENTS}.",
    )
    settle(
        "reduction_factor", sweep.reduction_factor, REDUCTION_FACTOR, f"The best of {REDUCTION_FACTOR:g} trials go on."
    )
    if sweep.learning_rates:
        before["learning_rate"] = _open("learning_rate", rates)
    if sweep.ranks:
        before["lora.rank"] = _open("lora.rank", ranks)
        alpha = before["lora.alpha"]
        if alpha.derived:
            ratio = _number(alpha) / rank
            before["lora.alpha"] = replace(alpha, value=ratio * ranks[0], reason=f"{ratio:g} times the trial's rank.")
    elif not sweep.learning_rates:
        before["learning_rate"] = _open("learning_rate", rates)
    return (*before.values(), *own)


def search_spec(resolved: Sequence[Resolved]) -> SearchSpec:
    """The trials of a job, from its resolved hyperparameters: the grid, or of it as many as `max_trials`, drawn by the
    seed, in the grid's order. An alpha that was derived keeps its ratio to the rank."""
    found = {item.name: item for item in resolved}
    value: dict[str, Any] = {name: item.value for name, item in found.items()}
    grid = [(float(rate), int(rank)) for rank in value["sweep.ranks"] for rate in value["sweep.learning_rates"]]
    if value["sweep.max_trials"] < len(grid):
        drawn = random.Random(int(value["seed"])).sample(range(len(grid)), int(value["sweep.max_trials"]))
        grid = [grid[index] for index in sorted(drawn)]
    alpha = found["lora.alpha"]
    ratio = _number(alpha) / value["lora.rank"]
    return SearchSpec(
        trials=tuple(
            Trial(number, rate, rank, ratio * rank if alpha.derived else _number(alpha))
            for number, (rate, rank) in enumerate(grid, start=1)
        ),
        grace_steps=int(value["sweep.grace_steps"]),
        reduction_factor=float(value["sweep.reduction_factor"]),
        max_concurrent_trials=int(value.get("sweep.max_concurrent_trials", 1)),
    )


def choose(resolved: Sequence[Resolved], chosen: Mapping[str, object]) -> tuple[Resolved, ...]:
    """`resolved` once a sweep has chosen: `chosen` is what its run's last report says under that name."""
    values: dict[str, Any] = {item.name: item.value for item in resolved}
    swept = {"learning_rate": "sweep.learning_rates", "lora.rank": "sweep.ranks"}

    def settled(item: Resolved) -> Resolved:
        value = chosen.get(item.name)
        if not isinstance(value, int | float):
            return item
        value = int(value) if item.name == "lora.rank" else float(value)
        among = values.get(swept.get(item.name, ""), [])
        if len(among) > 1:
            told = ", ".join(f"{one:g}" for one in among)
            return Resolved(item.name, value, True, f"Chosen by the sweep among {told}.")
        return replace(item, value=value)

    return tuple(settled(item) for item in resolved)


class State(StrEnum):
    """Where a trial is."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    ENDED_EARLY = "ended_early"
    FAILED = "failed"


@dataclass
class _Row:
    trial: Trial
    state: State = State.WAITING
    step: int = 0
    tokens_per_second: float = 0.0
    trained_tokens: int = 0
    best_loss: float = math.inf
    best: dict[str, Any] = field(default_factory=dict)
    """Data of the last `saved`."""
    failure: dict[str, Any] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        return self.state not in (State.WAITING, State.RUNNING)


class Ledger:
    """What the trials have told, and what the run tells of it. Every method returns reports: their kind and data."""

    def __init__(self, search: SearchSpec, total_steps: int) -> None:
        self._rows = {trial.number: _Row(trial) for trial in search.trials}
        self._total_steps = total_steps
        self._began_seconds = time.monotonic()

    def told(self, number: int, kind: str, data: dict[str, Any]) -> Tells:
        """Takes what a trial's worker tells: a report of `graft.training.worker`, or `saved`: its lowest held-out loss
        so far (`validation_loss`), whose adapter lies in `folder` now."""
        row = self._rows[number]
        if row.ended:  # an end overtakes what was on its way
            return []
        if kind == "started":
            row.state = State.RUNNING
            return [self._message(row, f"starts: {row.trial}.", startup_seconds=data.get("startup_seconds", {}))]
        if kind == "metrics":
            row.step = int(data["step"])
            row.tokens_per_second = float(data["tokens_per_second"])
            row.trained_tokens = int(data["trained_tokens"])
            return [("metrics", {**data, "trial": number, "sweep": self._progress(float(data["loss"]))})]
        if kind == "saved":
            row.best_loss, row.best = float(data["validation_loss"]), data
            return []
        if kind == "finished":
            row.state = State.FINISHED
            return [self._message(row, f"is done: {self._told_best(row)}.")]
        if kind == "failed":
            return self._fail(row, data)
        return [self._message(row, f"tells: {data['message']}")] if "message" in data else []

    def ended(self, number: int) -> Tells:
        """Takes that the scheduler has ended a trial, unless it has told its own end."""
        row = self._rows[number]
        if row.ended:
            return []
        row.state = State.ENDED_EARLY
        where = f"ends early at step {row.step} of {self._total_steps}"
        return [self._message(row, f"{where}: {self._told_best(row)}, and others are better.")]

    def lost(self, number: int, failure: dict[str, Any]) -> Tells:
        """Takes that a trial's worker has died without a word."""
        row = self._rows[number]
        return [] if row.ended else self._fail(row, failure)

    def winner(self) -> tuple[Trial, str] | None:
        """The trial with the lowest held-out loss, whichever way it ended, and the folder of its adapter of then."""
        row = self._best()
        return None if row is None else (row.trial, str(row.best["folder"]))

    def result(self) -> dict[str, Any]:
        """Data of the run's `finished`. Raises what the first trial failed with when none has anything to show."""
        row = self._best()
        if row is None:
            raise self._nothing()
        trial = row.trial
        numbers = {name: value for name, value in row.best.items() if name not in ("folder", "step")}
        return {
            **numbers,
            "message": f"Trial {trial.number} of {len(self._rows)} is the best: {trial}, "
            f"held-out loss {row.best_loss:.4f} at step {row.best['step']}.",
            "best_trial": trial.number,
            "best_learning_rate": trial.learning_rate,
            "best_rank": trial.rank,
            "best_step": row.best["step"],
            "chosen": {"learning_rate": trial.learning_rate, "lora.rank": trial.rank, "lora.alpha": trial.alpha},
            "trials": [self._line(one) for one in self._rows.values()],
        }

    def _line(self, row: _Row) -> dict[str, Any]:
        return {
            "trial": row.trial.number,
            "learning_rate": row.trial.learning_rate,
            "rank": row.trial.rank,
            "steps": row.step,
            "best_validation_loss": row.best_loss if row.best else None,
            "state": row.state.value,
        }

    def _best(self) -> _Row | None:
        return min((row for row in self._rows.values() if row.best), key=lambda row: row.best_loss, default=None)

    def _nothing(self) -> GraftError:
        failed = next((row for row in self._rows.values() if row.failure), None)
        if failed is None:
            return Internal("No trial has measured its held-out loss.", reason="NO_TRIAL")
        text = f"None of the {len(self._rows)} trials came to a measurement. Trial {failed.trial.number}: "
        kind = KINDS.get(str(failed.failure.get("code")), Internal)
        return kind(text + str(failed.failure.get("message")), reason=str(failed.failure.get("reason")))

    def _fail(self, row: _Row, failure: dict[str, Any]) -> Tells:
        row.state, row.failure = State.FAILED, failure
        return [self._message(row, f"has failed, and the others go on: {failure['message']}", level="warn")]

    def _message(self, row: _Row, text: str, **data: Any) -> tuple[str, dict[str, Any]]:
        told = f"Trial {row.trial.number} of {len(self._rows)} {text}"
        return "message", {"message": told, **self._line(row), **data}

    def _told_best(self, row: _Row) -> str:
        return f"held-out loss {row.best_loss:.4f} at step {row.best['step']}" if row.best else "no held-out loss"

    def _progress(self, loss: float) -> dict[str, Any]:
        """Of all trials: an early end leaves nothing to do."""
        rows = self._rows.values()
        total = self._total_steps * len(rows)
        done = sum(self._total_steps if row.ended else row.step for row in rows)
        elapsed_seconds = time.monotonic() - self._began_seconds
        return {
            "step": done,
            "total_steps": total,
            "loss": loss,
            "tokens_per_second": sum(row.tokens_per_second for row in rows if not row.ended),
            "trained_tokens": sum(row.trained_tokens for row in rows),
            "remaining_seconds": elapsed_seconds / max(done, 1) * (total - done),
        }


def _number(item: Resolved) -> float:
    if not isinstance(item.value, int | float):
        raise TypeError(f"{item.name} is {item.value!r}, and no number.")
    return item.value


def _open(name: str, values: Sequence[float]) -> Resolved:
    told = ", ".join(f"{value:g}" for value in values)
    return Resolved(name, values[0], len(values) > 1, f"The sweep chooses among {told}.")
