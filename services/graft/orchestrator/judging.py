"""Gives an evaluation's answers to its grader, a chunk at a time. Does not know graders, nor who answered."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

from graft.data.questions import Grade, Questions
from graft.domain.grading import GraderSpec
from graft.grading import GradeItem, build_grader
from graft.orchestrator.asking import Answers
from graft.orchestrator.patience import patiently
from graft.orchestrator.ports import Limits
from graft.orchestrator.threads import call

CHUNK = 64
"""Answers in one request to a grader, which has 60 s for it by default: a second for each; and what a cancelled
evaluation may leave a thread to finish unheard."""


async def passes(
    spec: GraderSpec, questions: Questions, answers: Answers, limits: Limits, on_graded: Callable[[int], None]
) -> list[int]:
    """How many answers to each question passed; of a question without an answer none did.

    `on_graded` is told of so many more. A grader that is away is waited for. Raises as
    `graft.grading.items.Grader.grade`, and Unavailable when the limit has passed.
    """
    grader = await call(build_grader, spec)
    passed = [0] * len(questions.items)
    on_graded(sum(len(answer.texts) for answer in answers.found.values() if answer.unanswered))
    items = _items(questions, answers)
    while chunk := list(islice(items, CHUNK)):
        given = [item for _, item in chunk]
        grades = await patiently("The grader", partial(call, grader.grade, given), limits)
        for (row, _), grade in zip(chunk, grades, strict=True):
            passed[row] += int(grade.passed)
        on_graded(len(chunk))
    return passed


def _items(questions: Questions, answers: Answers) -> Iterator[tuple[int, GradeItem]]:
    """Every answer that there is, with its row."""
    for row, item in enumerate(questions.items):
        assert isinstance(item, Grade)
        if not answers.found[row].unanswered:
            yield from ((row, GradeItem(item.row, text)) for text in answers.found[row].texts)
