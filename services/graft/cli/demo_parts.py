"""The tasks of `graft demo`: their rows, and how each is prompted and scored."""

from collections.abc import Sequence
from dataclasses import dataclass

from graft.cli.asking import Asked
from graft.data import samples
from graft.evaluation import metrics


@dataclass(frozen=True)
class Part:
    """One task of the demonstration: its rows, how it is prompted and scored."""

    sample: samples.Sample
    metric: str
    n_scored: int
    """Held-out rows that are scored; the others tell what answers cost."""
    shots: int
    epochs: float
    max_tokens: int

    @property
    def scored(self) -> tuple[samples.Row, ...]:
        """Held-out rows to score."""
        return self.sample.heldout[: self.n_scored]

    @property
    def unasked(self) -> tuple[samples.Row, ...]:
        """Held-out rows that no model has seen when costs are measured: no cache answers for them."""
        return self.sample.heldout[self.n_scored :]

    def contestants(self, base: str, adapter: str, rows: Sequence[samples.Row]) -> list[Asked]:
        """Base zero-shot, base few-shot and adapter, all held to the same answers."""
        shots = samples.choose_shots(self.sample, self.shots)
        zero = tuple(samples.zero_shot(row) for row in rows)
        few = tuple(samples.few_shot(row, shots) for row in rows)
        stop = () if self.sample.labels else ("\n",)
        return [
            Asked(model, prompts, self.sample.labels, self.max_tokens, stop)
            for model, prompts in ((base, zero), (base, few), (adapter, zero))
        ]

    @property
    def contestant_names(self) -> tuple[str, str, str]:
        """In the order of `contestants`."""
        return "base, zero-shot", f"base, {self.shots}-shot", "adapter"

    def score(self, answers: Sequence[str]) -> tuple[float, ...]:
        """One score in [0, 1] for each scored row."""
        function = metrics.accuracy if self.sample.labels else metrics.rouge_l
        return tuple(function(answers, [samples.answer(row) for row in self.scored]))


def parts() -> list[Part]:
    """The demonstration's two tasks, of a size that two cores train and answer in minutes."""
    return [
        Part(samples.reviews(400, 300 + 30), "accuracy", n_scored=300, shots=8, epochs=1.0, max_tokens=8),
        Part(samples.docstrings(200, 48 + 12), "ROUGE-L", n_scored=48, shots=3, epochs=1.0, max_tokens=32),
    ]
