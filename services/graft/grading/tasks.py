"""The grader of reasoning-gym's tasks."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from graft.domain.errors import InvalidArgument
from graft.grading.items import Grade, GradeItem, shorten, text_of, value_of
from graft.grading.packages import needed

_OPEN, _CLOSE = "<answer>", "</answer>"


class ReasoningGym:
    """The score of the data set that made the row.

    Raises:
        InvalidArgument: there is no such data set, or it has no such options.
    """

    def __init__(self, dataset: str, config: dict[str, Any] | None = None) -> None:
        reasoning_gym = needed("reasoning_gym")
        try:
            self._dataset = reasoning_gym.create_dataset(dataset, **(config or {}))
        except (ValueError, TypeError, AssertionError) as error:
            raise InvalidArgument(
                f"reasoning-gym makes no data set {dataset!r} with the options {config or {}}: {error}",
                reason="INVALID_GRADER",
            ) from None

    def grade(self, items: Sequence[GradeItem]) -> list[Grade]:
        """The data set's own score, in [0, 1]: some give part of a point for a near miss. Passed at 1."""
        return [self._grade(item) for item in items]

    def _grade(self, item: GradeItem) -> Grade:
        entry = {
            "question": item.row.get("question", ""),
            "answer": text_of(item.row, "answer"),
            "metadata": _metadata(item.row),
        }
        answer = _answer(item.completion)
        try:
            reward = float(self._dataset.score_answer(answer, entry))
        except Exception as error:  # noqa: BLE001 - each data set parses answers in its own way and raises what it likes
            return Grade(0.0, False, shorten(f"{answer!r} cannot be scored: {type(error).__name__}: {error}"))
        if not math.isfinite(reward):
            return Grade(0.0, False, shorten(f"{answer!r} scored {reward}"))
        return Grade(reward, reward >= 1.0, shorten(f"{answer!r} scored {reward:g} against {entry['answer']!r}"))


def _answer(completion: str) -> str:
    """What stands in the last <answer></answer>, or else the whole completion, without white space around it."""
    start = completion.rfind(_OPEN)
    if start < 0:
        return completion.strip()
    return completion[start + len(_OPEN) :].split(_CLOSE, 1)[0].strip()


def _metadata(row: Mapping[str, Any]) -> dict[str, Any]:
    metadata = value_of(row, "metadata")
    if isinstance(metadata, str):
        try:
            metadata = json.loads(metadata)
        except ValueError:
            metadata = None
    if not isinstance(metadata, Mapping):
        raise InvalidArgument(
            "The field 'metadata' of a row must be the object that reasoning-gym made, or its JSON.",
            reason="ROW_FIELD_TYPE",
            metadata={"field": "metadata"},
        )
    return dict(metadata)
