"""From the answers of an evaluation to its comparison, and from that to the figures that are stored.

Does not know who answered or where answers are kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from graft.data.questions import Ask, Predict, Prompt, Question, Questions, Rank, label_of
from graft.data.spool import View
from graft.domain import evaluations as domain
from graft.domain.resources import Dataset
from graft.evaluation.comparison import Candidate, ComparedTask, Comparison, Result, Speed
from graft.evaluation.figures import Answered, Figure, Graded, Likelihood, Preference, Row


class Answer(Protocol):
    """What came of one question (`graft.orchestrator.asking.Answer`)."""

    @property
    def texts(self) -> tuple[str, ...]: ...
    @property
    def nats(self) -> tuple[float, ...]: ...
    @property
    def scored_tokens(self) -> int: ...
    @property
    def generated_tokens(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    @property
    def unanswered(self) -> str: ...


@dataclass(frozen=True)
class Subject:
    """Who answered. Parameters and bytes are of the whole model, an adapter's base included."""

    label: str
    model: str
    tuned: bool
    parameters: int
    size_bytes: int
    memory_bytes: int | None = None
    """Of the engine that answered, with all its adapters."""


@dataclass(frozen=True)
class Measured:
    """A contestant and its answers, one a question in their order."""

    subject: Subject
    answers: tuple[Answer, ...]
    passed: Sequence[int]
    """Samples of each question that its grader passed; empty where nothing is graded."""
    elapsed_seconds: float
    """That asking took; 0 where some answers were there already, so that it tells nothing of speed."""


def compare(
    questions: Questions,
    metrics: Sequence[str],
    measured: Sequence[Measured],
    *,
    title: str,
    dataset: Dataset,
    created: datetime,
) -> Comparison:
    """The comparison. Raises InvalidArgument as `graft.evaluation.figures.measure`."""
    task = ComparedTask(
        name=dataset.id,
        title=title,
        source=dataset.display_name,
        license="",
        metrics=tuple(metrics),
        results=tuple(
            Result(each.subject.label, {kind: rows}, _speed(each))
            for each in measured
            for kind, rows in [_rows(questions, each)]
        ),
        inputs=View(len(questions.items), lambda row: _text_of(questions.items[row]))
        if isinstance(questions.items[0], Ask)
        else (),
        labels=questions.labels,
    )
    return Comparison(
        title=title,
        candidates=tuple(
            Candidate(one.label, one.model, one.tuned, one.parameters, one.size_bytes, one.memory_bytes)
            for one in (each.subject for each in measured)
        ),
        tasks=(task,),
        created=created,
        notes={
            "data": f"{dataset.display_name} ({dataset.digest[:19]}…), {len(questions.items)} rows",
            "decoding": f"temperature {questions.temperature:g}"
            + (f", one of {len(questions.labels)} labels" if questions.labels else ""),
        },
    )


def results_of(
    comparison: Comparison, contestants: Sequence[domain.Contestant], measured: Sequence[Measured]
) -> tuple[domain.ContestantResult, ...]:
    """The figures of every contestant, in their order."""
    (task,) = comparison.tasks
    labels = [each.subject.label for each in measured]
    return tuple(
        domain.ContestantResult(
            label=each.subject.label,
            model=each.subject.model,
            shots=contestant.shots,
            figures=tuple(
                _figure(found[each.subject.label])
                for name in task.metrics
                if each.subject.label in (found := task.figures[name])
            ),
            differences=tuple(
                domain.Difference(other, _figure(difference))
                for other in labels
                if other != each.subject.label
                and (difference := task.difference(each.subject.label, other)) is not None
            ),
            latency_p50_seconds=speed.latency_p50_seconds or 0.0,
            latency_p95_seconds=speed.latency_p95_seconds or 0.0,
            tokens_per_second=speed.tokens_per_second or 0.0,
            parameter_count=each.subject.parameters,
            size_bytes=each.subject.size_bytes,
            memory_bytes=each.subject.memory_bytes or 0,
            confusion=_confusion(task, each.subject.label),
            unanswered_count=sum(bool(answer.unanswered) for answer in each.answers),
        )
        for contestant, each in zip(contestants, measured, strict=True)
        for speed in [_speed(each)]
    )


def _figure(found: Figure) -> domain.Figure:
    return domain.Figure(found.metric, found.value, found.low, found.high, found.n)


def _confusion(task: ComparedTask, label: str) -> domain.Confusion | None:
    found = task.confusions.get(label)
    if found is None:
        return None
    return domain.Confusion(tuple(found.labels), tuple(int(count) for row in found.counts for count in row))


def _speed(measured: Measured) -> Speed:
    generated = sum(answer.generated_tokens for answer in measured.answers)
    if not generated:
        return Speed()
    # A question that does not fit is refused at once: it would make a model look quick.
    seconds = [answer.seconds for answer in measured.answers if not answer.unanswered]
    return Speed.of(seconds, generated, measured.elapsed_seconds)


def _rows(questions: Questions, measured: Measured) -> tuple[type[Row], list[Row]]:
    rows: list[Row] = []
    pairs = zip(questions.items, measured.answers, strict=True)
    if measured.passed:
        graded: list[Row] = [
            Graded(len(answer.texts), passed) for answer, passed in zip(measured.answers, measured.passed, strict=True)
        ]
        return Graded, graded
    for item, answer in pairs:
        if isinstance(item, Ask):
            rows.append(Answered(label_of(item, questions.labels, answer.texts[0]), (item.reference,)))
        elif isinstance(item, Rank):
            rows.append(Preference(-answer.nats[0], -answer.nats[1]))
        elif isinstance(item, Predict):
            rows.append(Likelihood(answer.nats[0], answer.scored_tokens, len(item.text.encode())))
    return type(rows[0]), rows


def _text_of(item: Question) -> str:
    """The prompt as people read it."""
    assert isinstance(item, Ask)
    return prompt_text(item.prompt)


def prompt_text(prompt: Prompt) -> str:
    """Raw text, or the last turn's."""
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content") or "")
