"""What a newer Graft has asked for that this one does not know, in jobs and evaluations (ADR 12).

To leave it out would train or measure something else than was asked for, so the whole job is the newer one's. Values
that a newer orchestrator has derived are nobody's wish: they are derived again.
"""

from collections.abc import Iterator
from dataclasses import fields

from graft.data.tasks.catalog import stored
from graft.domain.errors import InvalidArgument
from graft.domain.evaluations import Evaluation
from graft.domain.grading import GraderSpec, check_grader
from graft.domain.jobs import Hyperparameters, Job, LastLayers, Lora, Preference, Reinforcement, Sweep

_GROUPS = {
    "lora": Lora,
    "last_layers": LastLayers,
    "preference": Preference,
    "reinforcement": Reinforcement,
    "sweep": Sweep,
}
HYPERPARAMETERS = frozenset(
    {field.name for field in fields(Hyperparameters)}
    | {f"{group}.{field.name}" for group, kind in _GROUPS.items() for field in fields(kind)}
    | {"delta_rank"}
)
"""Names of all that `graft.training.derive` settles."""


def unknown_in_job(job: Job) -> tuple[str, ...]:
    """Fields of the job's specification, or faults of its task and grader; empty for a job that can be carried out."""
    spec = job.spec
    return (*job.unknown, *_task(spec.task_definition), *_grader(spec.reinforcement.grader, "reinforcement.grader"))


def unknown_in_evaluation(evaluation: Evaluation) -> tuple[str, ...]:
    """The same of an evaluation."""
    spec = evaluation.spec
    return (*evaluation.unknown, *_task(spec.task_definition), *_grader(spec.grader, "grader"))


def unknown_hyperparameters(job: Job) -> tuple[str, ...]:
    """Names of what a newer orchestrator has derived."""
    return tuple(item.name for item in job.resolved if item.name not in HYPERPARAMETERS)


# Both were checked before they were stored: what is wrong with them here is new.


def _task(definition: str) -> Iterator[str]:
    try:
        if definition:
            stored(definition)
    except InvalidArgument as error:
        yield from (f"task_definition.{fault.field}" for fault in error.violations)


def _grader(spec: GraderSpec | None, path: str) -> Iterator[str]:
    if spec is not None:
        yield from (fault.field for fault in check_grader(spec, path))
