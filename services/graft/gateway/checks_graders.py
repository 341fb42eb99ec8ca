"""What a grader needs of the rows that it judges by, told before anything is asked. Reads the first row."""

from collections.abc import Iterator
from pathlib import Path

from graft.data.reading import read_rows
from graft.data.tasks.catalog import stored
from graft.domain.errors import FieldViolation
from graft.domain.grading import GraderSpec, compared_with, row_fields
from graft.domain.resources import Dataset, DatasetFormat


def with_reference(grader: GraderSpec, dataset: Dataset | None, task_definition: str) -> GraderSpec:
    """Through a task, a grader that names no reference compares with the task's completion."""
    if dataset is None or dataset.format is not DatasetFormat.FIELDS or not task_definition:
        return grader
    return compared_with(grader, stored(task_definition).completion.field)


def check_rows(grader: GraderSpec, dataset: Dataset, path: str) -> Iterator[FieldViolation]:
    """A field that the grader, which the request has at `path`, needs and the first row lacks.

    `dataset` as it lies on this host; a file that is gone is told when it is read.
    """
    if not (file := Path(dataset.uri)).is_file():
        return
    row = next(read_rows(file), {})
    for setting, name in row_fields(grader).items():
        if isinstance(name, str) and row.get(name) is None:
            yield FieldViolation(
                f"{path}.settings.{setting}",
                f"is {name!r}, which the first row does not have; it has: {', '.join(row)[:200]}. Name the field that "
                "holds what answers are judged by",
            )
