"""A comparison of any number of models, and its answer: does a smaller fine-tuned model beat a larger base?

Owns what was measured of each model and the verdict drawn from it; the page is `graft.evaluation.comparison_page`, the
figures are `graft.evaluation.figures`. Does not know how the rows were got.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from typing import Literal

import numpy as np

from graft.domain.errors import InvalidArgument
from graft.domain.units import count_text
from graft.evaluation import charts, figures
from graft.evaluation.bootstrap import Statistic
from graft.evaluation.confusion import Confusion, confusion
from graft.evaluation.figures import Answered, Figure, Likelihood, Metric, Row

Outcome = Literal["better", "worse", "undecided"]


@dataclass(frozen=True)
class Candidate:
    """A model with a way of prompting it.

    Attributes:
        name: what the reader calls it: `360M base, few-shot (8)`, `reviews@3`. Unique.
        model: the public model id.
        tuned: whether it was fine-tuned for the tasks compared.
        parameters: of the whole model, an adapter's base included; `None` where it is not known.
        size_bytes: on disk, an adapter's base included; `None` where it is not known.
        memory_bytes: what serving it held at most; `None` where it was not measured.
    """

    name: str
    model: str
    tuned: bool
    parameters: int | None = None
    size_bytes: int | None = None
    memory_bytes: int | None = None

    @property
    def sized_name(self) -> str:
        """The name with the number of parameters, where it is known and the name does not say one."""
        if self.parameters is None or re.search(r"\d[MB]\b", self.name, re.IGNORECASE):
            return self.name
        return f"{self.name} ({count_text(self.parameters)})"


@dataclass(frozen=True)
class Speed:
    """How quick the answers of one task were; `None` where it was not measured.

    Attributes:
        latency_p50_seconds: from request to whole answer, half of them quicker; of questions with an answer.
        latency_p95_seconds: the same, 95 of 100 quicker.
        tokens_per_second: generated, over all requests that ran at once.
    """

    latency_p50_seconds: float | None = None
    latency_p95_seconds: float | None = None
    tokens_per_second: float | None = None

    @classmethod
    def of(cls, latencies_seconds: Sequence[float], generated_tokens: int, elapsed_seconds: float) -> "Speed":
        """From the latency of each request, and what all generated between the first's start and the last's end."""
        p50, p95 = np.quantile(latencies_seconds, [0.5, 0.95]) if latencies_seconds else (None, None)
        return cls(
            None if p50 is None else float(p50),
            None if p95 is None else float(p95),
            generated_tokens / elapsed_seconds if elapsed_seconds > 0 else None,
        )


@dataclass(frozen=True)
class Result:
    """What one candidate made of one task: rows, or the figures that were computed from them where they were held.

    Attributes:
        candidate: its name.
        rows: by kind, each in the task's order; a metric without rows or figure was not measured.
        figures: by metric; what is here is not computed again.
        differences: by the candidate that is subtracted: the paired difference in the task's first metric.
        confusion: of a classification.
    """

    candidate: str
    rows: Mapping[type[Row], Sequence[Row]] = field(default_factory=dict)
    speed: Speed = field(default_factory=Speed)
    figures: Mapping[str, Figure] = field(default_factory=dict)
    differences: Mapping[str, Figure] = field(default_factory=dict)
    confusion: Confusion | None = None


@dataclass(frozen=True)
class Gain:
    """The fine-tuned candidate against its rival on one task, by the task's first metric.

    Attributes:
        advantage: the paired difference, turned so that above zero the fine-tuned one does better.
        smaller: whether the rival is the larger model.
    """

    task: "ComparedTask"
    tuned: Candidate
    rival: Candidate
    advantage: Figure
    smaller: bool

    @property
    def outcome(self) -> Outcome:
        """By the interval: `undecided` if it holds zero."""
        if self.advantage.low > 0:
            return "better"
        return "worse" if self.advantage.high < 0 else "undecided"

    @property
    def sentence(self) -> str:
        """The outcome in words."""
        metric = figures.metric(self.advantage.metric)
        scale = scale_of(metric)
        rival = f"the larger {self.rival.sized_name}" if self.smaller else self.rival.sized_name
        less = "" if metric.higher_is_better else ", of which less is better"
        interval = f"95% interval {scale.difference(self.advantage.low)} to {scale.difference(self.advantage.high)}"
        if self.outcome == "undecided":
            found = (
                f"{scale.difference(self.advantage.value)}{scale.difference_unit} of {metric.title}{less}; {interval}"
            )
            return f"On {self.task.title}, these rows cannot tell {self.tuned.sized_name} from {rival} ({found})."
        verb = "beats" if self.outcome == "better" else "is beaten by"
        amount = f"{scale.difference(abs(self.advantage.value)).removeprefix('+')}{scale.difference_unit}"
        return (
            f"On {self.task.title}, {self.tuned.sized_name} {verb} {rival} "
            f"by {amount} of {metric.title}{less} ({interval})."
        )


@dataclass(frozen=True)
class ComparedTask:
    """One task, and what each candidate made of it.

    Attributes:
        metrics: names; the first decides.
        inputs: one a row, for the examples; none leaves them out.
        labels: every label of a classification; asks for confusion matrices.

    Raises:
        InvalidArgument: an unknown metric or none, or rows that do not line up.
    """

    name: str
    title: str
    source: str
    license: str
    metrics: tuple[str, ...]
    results: tuple[Result, ...]
    inputs: Sequence[str] = ()
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.metrics or not self.results:
            raise InvalidArgument(f"Task {self.name!r} needs a metric and a result.", reason="EMPTY_TASK")
        for name in self.metrics:
            figures.metric(name)
        for kind in {kind for result in self.results for kind in result.rows}:
            counts = {result.candidate: len(result.rows[kind]) for result in self.results if kind in result.rows}
            if kind is Answered and self.inputs:
                counts["the inputs"] = len(self.inputs)
            if len(set(counts.values())) > 1:
                told = ", ".join(f"{count} of {name}" for name, count in counts.items())
                raise InvalidArgument(
                    f"The {kind.__name__} rows of task {self.name!r} do not line up: {told}.", reason="UNEQUAL_LENGTHS"
                )

    @cached_property
    def figures(self) -> dict[str, dict[str, Figure]]:
        """By metric, then by candidate; without those that were not measured."""
        found: dict[str, dict[str, Figure]] = {name: {} for name in self.metrics}
        for name, by_candidate in found.items():
            kind = figures.metric(name).row
            for result in self.results:
                if name in result.figures:
                    by_candidate[result.candidate] = result.figures[name]
                elif kind in result.rows:
                    statistic, n = self._statistic(name, result), len(result.rows[kind])
                    by_candidate[result.candidate] = figures.figure_of(name, statistic, n)
        return found

    @property
    def n(self) -> int:
        """Rows that the first metric was measured on."""
        return max((figure.n for figure in self.figures[self.metrics[0]].values()), default=0)

    @cached_property
    def confusions(self) -> dict[str, Confusion]:
        """By candidate, where there are labels or matrices."""
        found = {}
        for result in self.results:
            if result.confusion is not None:
                found[result.candidate] = result.confusion
            elif self.labels and Answered in result.rows:
                found[result.candidate] = confusion(*figures.labelled(result.rows[Answered]), self.labels)
        return found

    def difference(self, candidate: str, baseline: str) -> Figure | None:
        """The candidate's first metric less the baseline's, paired by row.

        `None` where either was not measured, or in perplexity where their tokens differ (`tokenized_alike`).

        Raises:
            InvalidArgument: rows that do not pair up.
        """
        by_name = {result.candidate: result for result in self.results}
        ours, theirs = by_name[candidate], by_name[baseline]
        if baseline in ours.differences:
            return ours.differences[baseline]
        if (baseline, candidate) in self._differences:
            found = self._differences[baseline, candidate]
            return found and _turned(found)
        if (candidate, baseline) not in self._differences:
            self._differences[candidate, baseline] = self._difference(ours, theirs)
        return self._differences[candidate, baseline]

    def _difference(self, ours: Result, theirs: Result) -> Figure | None:
        name, kind = self.metrics[0], figures.metric(self.metrics[0]).row
        if kind not in ours.rows or kind not in theirs.rows:
            return None
        try:
            figures.check_pairs(name, ours.rows[kind], theirs.rows[kind])
        except InvalidArgument as error:
            if error.reason == "UNPAIRED_TOKENS":
                return None
            raise
        both = figures.less(self._statistic(name, ours), self._statistic(name, theirs))
        return figures.figure_of(name, both, len(ours.rows[kind]))

    def _statistic(self, name: str, result: Result) -> Statistic:
        """Scored once: of sixteen candidates each is in thirty differences, and ROUGE takes milliseconds a row."""
        if (name, result.candidate) not in self._statistics:
            rows = result.rows[figures.metric(name).row]
            self._statistics[name, result.candidate] = figures.statistic(name, rows, self.labels)
        return self._statistics[name, result.candidate]

    @cached_property
    def _statistics(self) -> dict[tuple[str, str], Statistic]:
        """By metric and candidate, as they are asked for."""
        return {}

    @cached_property
    def _differences(self) -> dict[tuple[str, str], Figure | None]:
        """By candidate and baseline, as they are asked for; each pair in one of its orders."""
        return {}

    @cached_property
    def tokenized_alike(self) -> tuple[tuple[str, ...], ...]:
        """The candidates with likelihoods, in groups to which the texts are the same numbers of tokens."""
        groups: dict[tuple[int, ...], list[str]] = {}
        for result in self.results:
            rows = result.rows.get(Likelihood, ())
            if tokens := tuple(row.tokens for row in rows if isinstance(row, Likelihood)):
                groups.setdefault(tokens, []).append(result.candidate)
        return tuple(map(tuple, groups.values()))


@dataclass(frozen=True)
class Comparison:
    """What one page says.

    Attributes:
        notes: label to value: how it was measured, concurrency, decoding.
        machine: where it ran, label to value.

    Raises:
        InvalidArgument: no task, two tasks or candidates of one name, or a result of nobody or twice of one.
    """

    title: str
    candidates: tuple[Candidate, ...]
    tasks: tuple[ComparedTask, ...]
    created: datetime
    notes: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [each.name for each in self.candidates]
        tasks = [task.name for task in self.tasks]
        if not tasks or len(set(tasks)) < len(tasks) or len(set(names)) < len(names):
            raise InvalidArgument(
                f"A comparison needs a task, and each task and candidate a name of its own; the tasks are "
                f"{', '.join(tasks) or 'none'}, the candidates {', '.join(names) or 'none'}.",
                reason="INVALID_COMPARISON",
            )
        for task in self.tasks:
            given = [result.candidate for result in task.results]
            wrong = sorted({name for name in given if name not in names or given.count(name) > 1})
            if wrong:
                raise InvalidArgument(
                    f"Task {task.name!r} needs one result a candidate at most ({', '.join(names)}), "
                    f"but has other or further ones of {', '.join(wrong)}.",
                    reason="INVALID_COMPARISON",
                )

    @cached_property
    def gains(self) -> tuple[Gain, ...]:
        """The answer of each task that has a fine-tuned candidate and a base."""
        return tuple(gain for task in self.tasks if (gain := self._gain(task)) is not None)

    @property
    def outcome(self) -> Outcome | Literal["mixed"]:
        """Of all tasks together; `undecided` without any that answers."""
        outcomes = {gain.outcome for gain in self.gains} or {"undecided"}
        return outcomes.pop() if len(outcomes) == 1 else "mixed"

    @property
    def answer(self) -> str:
        """The outcome as one word or two: does the smaller fine-tuned model beat the larger base?"""
        return {"better": "Yes", "worse": "No", "undecided": "Undecided", "mixed": "In part"}[self.outcome]

    @property
    def headline(self) -> str:
        """The answer's one sentence, of the task or of all of them."""
        if not self.gains:
            return "No task has a fine-tuned model and a base that were compared row by row."
        if len(self.gains) == 1:
            return self.gains[0].sentence
        outcomes = [gain.outcome for gain in self.gains]
        counts = [f"{each} on {outcomes.count(each)}" for each in ("better", "worse", "undecided") if each in outcomes]
        return f"Of {len(outcomes)} tasks it is {', '.join(counts)}."

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the headline leaves unsaid: each task's sentence, where there are several, a missing larger base, and
        what could not be compared."""
        said = [gain.sentence for gain in self.gains] if len(self.gains) > 1 else []
        if self.gains and not any(gain.smaller for gain in self.gains):
            said.append("No base known to be larger was compared.")
        for task in self.tasks:
            groups = task.tokenized_alike
            if task.metrics[0] == "perplexity" and len(groups) > 1:
                said.append(
                    f"On {task.title}, perplexity is not compared between models whose tokenizers differ "
                    f"({' | '.join(', '.join(names) for names in groups)}): it is a figure a token. "
                    "Compare bits_per_byte."
                )
        return tuple(said)

    def _gain(self, task: ComparedTask) -> Gain | None:
        """The best fine-tuned candidate that has a larger base to beat, against the best of those.

        Without such a pair, the best fine-tuned one against the best base; pairs without a difference do not count.
        Ties go to the first. Both are chosen on the rows that they are then compared on: that favours each in its own
        group.
        """
        metric = figures.metric(task.metrics[0])
        measured = task.figures[metric.name]
        # min and max both give the first of equals, so the sign is what decides.
        ranked = sorted(
            (each for each in self.candidates if each.name in measured),
            key=lambda each: -measured[each.name].value if metric.higher_is_better else measured[each.name].value,
        )
        bases = [each for each in ranked if not each.tuned]
        pairs = [(tuned, base) for tuned in ranked if tuned.tuned for base in bases]
        smaller = [(tuned, base) for tuned, base in pairs if (tuned.parameters or math.inf) < (base.parameters or 0)]
        for tuned, rival in (*smaller, *pairs):
            found = task.difference(tuned.name, rival.name)
            if found is None:
                continue
            advantage = found if metric.higher_is_better else _turned(found)
            return Gain(task, tuned, rival, advantage, (tuned, rival) in smaller)
        return None


def _turned(difference: Figure) -> Figure:
    """The difference the other way round."""
    return replace(difference, value=0.0 - difference.value, low=0.0 - difference.high, high=0.0 - difference.low)


def scale_of(metric: Metric) -> charts.Scale:
    """How values of the metric are shown."""
    return charts.PERCENT if metric.percent else charts.PLAIN
