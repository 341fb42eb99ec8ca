"""Confusion matrices of classification, and the macro-F1 that follows from their counts.

Owns the counting; does not know how a model is made to answer with a label. An answer that is no label, white space
around it aside, counts in a column of its own: as a miss for the reference's label, and as a false alarm for none.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from graft.domain.errors import InvalidArgument
from graft.evaluation.bootstrap import Statistic


@dataclass(frozen=True)
class LabelScore:
    """How well one label was found. `None` where nothing was there to be counted (0/0).

    Attributes:
        references: rows whose reference is the label.
    """

    label: str
    precision: float | None
    recall: float | None
    f1: float | None
    references: int


@dataclass(frozen=True)
class Confusion:
    """How often each label was answered where each was right.

    Attributes:
        counts: one row for each label as reference; one column for each label as answer, then one for other answers.
    """

    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]

    def scores(self) -> list[LabelScore]:
        """Precision, recall and F1 of each label, in the labels' order."""
        found = []
        for place, label in enumerate(self.labels):
            right = self.counts[place][place]
            answered, wanted = sum(row[place] for row in self.counts), sum(self.counts[place])
            found.append(
                LabelScore(
                    label,
                    right / answered if answered else None,
                    right / wanted if wanted else None,
                    2 * right / (answered + wanted) if answered + wanted else None,
                    wanted,
                )
            )
        return found


def confusion(answers: Sequence[str], references: Sequence[str], labels: Sequence[str]) -> Confusion:
    """Counts answers by reference.

    Raises:
        InvalidArgument: unequal lengths, no labels, one label twice, or a reference that is no label.
    """
    given, wanted = _places(answers, references, labels)
    counts = np.zeros((len(labels), len(labels) + 1), dtype=np.int64)
    np.add.at(counts, (wanted, given), 1)
    return Confusion(tuple(labels), tuple(tuple(row) for row in counts.tolist()))


def macro_f1_of(answers: Sequence[str], references: Sequence[str], labels: Sequence[str]) -> Statistic:
    """The unweighted mean of the labels' F1, as a statistic.

    A label that neither answers nor references of a sample hold has no F1 there, and is left out of that mean.

    Raises:
        InvalidArgument: as `confusion`.
    """
    given_R, wanted_R = _places(answers, references, labels)
    n_labels = len(labels)
    right_R = np.where(given_R == wanted_R, given_R, n_labels)

    def macro_f1(rows_BR: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        def by_label(places_R: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
            """How often each label stands in each resample, shape (B, labels)."""
            resamples = len(rows_BR)
            slots = places_R[rows_BR] + (n_labels + 1) * np.arange(resamples)[:, None]
            counts = np.bincount(slots.ravel(), minlength=resamples * (n_labels + 1))
            return counts.reshape(resamples, n_labels + 1)[:, :n_labels]

        seen = by_label(given_R) + by_label(wanted_R)
        f1 = 2 * by_label(right_R) / np.maximum(seen, 1)
        means: npt.NDArray[np.float64] = f1.sum(axis=1) / (seen > 0).sum(axis=1)
        return means

    return macro_f1


def _places(
    answers: Sequence[str], references: Sequence[str], labels: Sequence[str]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The place among the labels of each answer and reference; `len(labels)` for answers outside of them."""
    if len(answers) != len(references):
        raise InvalidArgument(
            f"{len(answers)} answers cannot be scored against {len(references)} references: give one of each a row.",
            reason="UNEQUAL_LENGTHS",
        )
    places = {label.strip(): place for place, label in enumerate(labels)}
    if not labels or len(places) < len(labels):
        raise InvalidArgument(
            f"The labels are {list(labels)}: give at least one, each once, white space aside.", reason="INVALID_LABELS"
        )
    for row, reference in enumerate(references):
        if reference.strip() not in places:
            raise InvalidArgument(
                f"The reference of row {row}, {reference!r}, is none of the labels {', '.join(labels)}.",
                reason="UNKNOWN_LABEL",
            )
    return (
        np.array([places.get(answer.strip(), len(labels)) for answer in answers], dtype=np.int64),
        np.array([places[reference.strip()] for reference in references], dtype=np.int64),
    )
