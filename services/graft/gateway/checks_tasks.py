"""What the task of a job must satisfy, and the definition that is stored with the job.

Reads the first row of the training data for the task's fields. The labels of a task that takes them from its data were
counted when the data was uploaded. Every row is rendered when the job is validated.
"""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from graft.data.labels import MAX_FIELDS
from graft.data.reading import read_rows
from graft.data.tasks import catalog
from graft.data.tasks.definition import MAX_DEFINITION_CHARACTERS, TaskDefinition, load
from graft.data.tasks.reading import MAX_LABELS
from graft.data.tasks.rows import CONVERSATIONS, FORMATS, labels_of
from graft.domain.errors import FieldViolation, InvalidArgument, NotFound
from graft.domain.jobs import JobSpec, Method
from graft.domain.resources import AdapterVersion, Dataset, DatasetFormat


async def with_task(
    spec: JobSpec,
    training: Dataset | None,
    validation: Dataset | None,
    start: AdapterVersion | None,
    shown: Dataset | None = None,
    learned: Sequence[str] = (),
) -> tuple[JobSpec, list[FieldViolation]]:
    """The specification with the task's whole definition in it, and what is wrong with the task.

    Rows of fields without a task are of the task of the version that training goes on from, if that has one. Of an
    evaluation `shown` is the data set of its shots, `shots_dataset`, and `learned` are the definitions of the tasks
    that its models were trained with: the labels of both count too.
    """
    if not (spec.task or spec.task_definition) and start and training and training.format is DatasetFormat.FIELDS:
        spec = replace(spec, task_definition=start.task_definition)
    if not spec.task and not spec.task_definition:
        return spec, []
    try:
        task = definition_of(spec.task, spec.task_definition)
    except InvalidArgument as error:
        return spec, list(error.violations)
    wrong = [
        *_check_format(task, training, "training_dataset"),
        *_check_format(task, validation, "validation_dataset"),
        *_check_format(task, shown, "shots_dataset"),
    ]
    if wrong or training is None:
        return spec, wrong
    try:
        graded = spec.method is Method.REINFORCEMENT
        task = await asyncio.to_thread(_with_data, task, training, shown, learned, graded=graded)
    except InvalidArgument as error:
        return spec, list(error.violations)
    return replace(spec, task=task.name, task_definition=task.to_text()), []


def definition_of(name: str, text: str) -> TaskDefinition:
    """The built-in task `name`, or the one that `text` defines.

    Raises InvalidArgument with the faults as the fields `task` and `task_definition`.
    """
    if name and text:
        raise _refused("task", "names a built-in task, and task_definition is given too; give one of them")
    try:
        return load(text) if text else catalog.builtin(name)
    except NotFound as error:
        raise _refused("task", error.message) from None
    except InvalidArgument as error:
        raise InvalidArgument(
            error.message,
            reason=error.reason,
            violations=tuple(
                FieldViolation(f"task_definition.{fault.field}".rstrip("."), fault.description)
                for fault in error.violations
            ),
        ) from None


def _check_format(task: TaskDefinition, dataset: Dataset | None, field: str) -> Iterator[FieldViolation]:
    if dataset is None or dataset.format in FORMATS or (task.conversations and dataset.format in CONVERSATIONS):
        return
    yield FieldViolation(
        field,
        f"has {dataset.format} rows, which hold their prompt already, and the task {task.name!r} makes prompts of "
        f"{', '.join(task.required)}; leave the task out, or upload rows of fields ({DatasetFormat.FIELDS})",
    )


def _with_data(
    task: TaskDefinition, training: Dataset, shown: Dataset | None, learned: Sequence[str], *, graded: bool
) -> TaskDefinition:
    """The task with its labels. Rows of the `training` data whose answers are `graded` need hold none.

    Raises InvalidArgument when the data does not fit it.
    """
    given: list[tuple[Dataset, Mapping[str, Any]]] = []
    for dataset, field in ((training, "training_dataset"), (shown, "shots_dataset")):
        if dataset is None or dataset.format in CONVERSATIONS or not (path := Path(dataset.uri)).is_file():
            continue  # a file that is gone is told when the job is validated
        needed = task.required if graded and dataset is training else (*task.required, task.completion.field)
        first = next(read_rows(path), {})
        if missing := [name for name in needed if name not in first]:
            raise _refused(
                field,
                f"has no {' and no '.join(map(repr, missing))}, which the task {task.name!r} needs; it has: "
                f"{', '.join(first)[:200]}. Rename columns, or write the task for them (`graft tasks new`)",
            )
        given.append((dataset, first))
    if not task.labels_from_data or not given:
        return task
    try:
        known = chain(_labels_learned(task, learned), *(_counted(task, dataset, first) for dataset, first in given))
        return task.with_labels(labels_of(task, ({task.completion.field: label} for label in known)))
    except InvalidArgument as error:
        raise _refused("task", error.message) from None


def _counted(task: TaskDefinition, dataset: Dataset, first: Mapping[str, Any]) -> tuple[str, ...]:
    """The values of the task's answers as counted when the data was uploaded. Raises InvalidArgument where they were
    not, or are too many. `first` is the data's first row."""
    field = task.completion.field
    told = f"takes its labels from the data, and the values of {field!r} in {dataset.id}"
    write = "write the labels into the task (`graft tasks new --label`)"
    if dataset.labels is None:
        raise _refused(
            "task", f"{told} were not counted by the older Graft that stored it; upload it again, or {write}"
        )
    if field not in dataset.labels and field in first:
        raise _refused("task", f"{told} were not counted, since its rows have more than {MAX_FIELDS} fields; {write}")
    if not (found := dataset.labels.get(field, ("",))):
        raise _refused(
            "task",
            f"{told} are no labels: there are more than {MAX_LABELS} different values, or they have more than "
            f"{MAX_DEFINITION_CHARACTERS} characters together",
        )
    return found


def _labels_learned(task: TaskDefinition, learned: Sequence[str]) -> Iterator[str]:
    for text in filter(None, learned):
        with suppress(InvalidArgument):  # of a later version of Graft
            found = load(text)
            if found.name == task.name:
                yield from found.labels


def _refused(field: str, description: str) -> InvalidArgument:
    return InvalidArgument(
        f"{field}: {description}", reason="INVALID_JOB", violations=(FieldViolation(field, description),)
    )
