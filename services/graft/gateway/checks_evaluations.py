"""What an evaluation must satisfy before it is stored. All its faults are reported together."""

from collections.abc import Iterator
from dataclasses import replace

from graft.domain.errors import FailedPrecondition, FieldViolation, GraftError, InvalidArgument, NotFound
from graft.domain.evaluations import Contestant, EvaluationSpec
from graft.domain.grading import check_grader
from graft.domain.jobs import JobSpec, Method
from graft.domain.resources import Dataset
from graft.gateway.checks_tasks import with_task
from graft.gateway.resolving import resolve
from graft.settings import Settings
from graft.store.protocol import Store

MAX_CONTESTANTS = 16
"""The intervals of a larger field say little: each is compared with each."""
MAX_SHOTS = 64
MAX_SAMPLES = 200
"""pass@100 with the estimator of Chen et al. 2021 (arXiv:2107.03374) samples 200."""
METRICS = {
    "accuracy": "answers",
    "macro_f1": "answers",
    "exact_match": "answers",
    "token_f1": "answers",
    "rouge_1": "answers",
    "rouge_2": "answers",
    "rouge_l": "answers",
    "chrf": "answers",
    "pass_at_1": "grades",
    "pass_at_5": "grades",
    "pass_at_10": "grades",
    "pass_at_100": "grades",
    "win_rate": "pairs",
    "perplexity": "texts",
    "bits_per_byte": "texts",
}
"""Every metric, and what it is computed from. `graft.evaluation` computes them: it is not imported here, where numpy
would be a guest; a test holds the two together."""
NEEDS = {"answers": "answers", "grades": "graded_prompts", "pairs": "preference", "texts": "text"}


def measured_from(dataset: Dataset) -> str:
    """`answers`, `grades`, `pairs` or `texts`: what an evaluation finds on data of this format."""
    found = {"graded_prompts": "grades", "preference": "pairs", "openai_preference": "pairs", "text": "texts"}
    return found.get(dataset.format.value, "answers")


async def check_evaluation(store: Store, project: str, spec: EvaluationSpec, settings: Settings) -> EvaluationSpec:
    """Returns the specification with versions in the place of aliases.

    Raises InvalidArgument with every fault. When the only faults are names that do not exist, raises NotFound.
    """
    missing: list[FieldViolation] = []
    wrong: list[FieldViolation] = []
    dataset: Dataset | None = None
    try:
        dataset = await store.get_dataset(project, spec.dataset)
    except NotFound as error:
        missing.append(FieldViolation("dataset", error.message))
    if spec.shots_dataset is not None:
        try:
            await store.get_dataset(project, spec.shots_dataset)
        except NotFound as error:
            missing.append(FieldViolation("shots_dataset", error.message))
    contestants = []
    for index, contestant in enumerate(spec.contestants):
        field = f"contestants[{index}].model"
        try:
            found = await resolve(store, project, contestant.model, settings.serving.base_model)
            contestants.append(replace(contestant, model=found.public_model))
        except (InvalidArgument, FailedPrecondition) as error:
            wrong.append(FieldViolation(field, error.message))
        except NotFound as error:
            missing.append(FieldViolation(field, error.message))
    wrong += [*_check_contestants(spec, contestants), *_check_numbers(spec), *_check_metrics(spec, dataset)]
    spec, faults = await _with_task(spec, dataset, settings)
    wrong += faults
    if wrong or missing:
        violations = (*wrong, *missing)
        kind: type[GraftError] = InvalidArgument if wrong else NotFound
        raise kind(
            " ".join(f"{fault.field}: {fault.description.rstrip('.')}." for fault in violations),
            reason="INVALID_EVALUATION" if wrong else "EVALUATION_SUBJECT_NOT_FOUND",
            violations=violations,
        )
    return replace(spec, contestants=tuple(contestants))


async def _with_task(
    spec: EvaluationSpec, dataset: Dataset | None, settings: Settings
) -> tuple[EvaluationSpec, list[FieldViolation]]:
    """As a job's task is checked, its data being the data that is asked."""
    job = JobSpec("", spec.dataset, task=spec.task, task_definition=spec.task_definition)
    if dataset is not None and measured_from(dataset) == "grades":
        job = replace(job, method=Method.REINFORCEMENT)
    job, faults = await with_task(job, dataset, None, None, settings)
    renamed = [replace(fault, field=fault.field.replace("training_dataset", "dataset")) for fault in faults]
    return replace(spec, task=job.task, task_definition=job.task_definition), renamed


def _check_contestants(spec: EvaluationSpec, resolved: list[Contestant]) -> Iterator[FieldViolation]:
    if not 1 <= len(spec.contestants) <= MAX_CONTESTANTS:
        yield FieldViolation("contestants", f"are {len(spec.contestants)}; give 1 to {MAX_CONTESTANTS}")
    for index, contestant in enumerate(resolved):
        if contestant in resolved[:index]:
            yield FieldViolation(f"contestants[{index}]", f"{contestant.label} is there twice")
    for index, contestant in enumerate(spec.contestants):
        if not 0 <= contestant.shots <= MAX_SHOTS:
            yield FieldViolation(f"contestants[{index}].shots", f"{contestant.shots} is outside [0, {MAX_SHOTS}]")
    if spec.shots_dataset is None and any(contestant.shots for contestant in spec.contestants):
        yield FieldViolation("shots_dataset", "is required: contestants with shots take them from it")
    if spec.shots_dataset is not None and spec.shots_dataset == spec.dataset:
        yield FieldViolation("shots_dataset", "is the data set that is asked: the answers would be shown")


def _check_numbers(spec: EvaluationSpec) -> Iterator[FieldViolation]:
    for name, value, most in (
        ("max_rows", spec.max_rows, 10_000_000),
        ("samples", spec.samples, MAX_SAMPLES),
        ("max_tokens", spec.max_tokens, 1_000_000),
    ):
        if not 0 <= value <= most:
            yield FieldViolation(name, f"{value} is outside [0, {most}]")


def _check_metrics(spec: EvaluationSpec, dataset: Dataset | None) -> Iterator[FieldViolation]:
    for index, name in enumerate(spec.metrics):
        field = f"metrics[{index}]"
        if name not in METRICS:
            yield FieldViolation(field, f"{name!r} is not a metric; use: {', '.join(METRICS)}")
        elif name in spec.metrics[:index]:
            yield FieldViolation(field, f"{name!r} is named twice")
        elif dataset is not None and METRICS[name] != measured_from(dataset):
            fitting = ", ".join(metric for metric, source in METRICS.items() if source == measured_from(dataset))
            yield FieldViolation(field, f"{name!r} cannot be computed from {dataset.format} rows; use: {fitting}")
    if dataset is None:
        return
    graded = measured_from(dataset) == "grades"
    if graded and spec.grader is None:
        yield FieldViolation("grader", "is required: it judges the answers to these prompts")
    if graded and spec.grader is not None:
        yield from check_grader(spec.grader)
    if not graded and (spec.grader is not None or spec.samples > 1):
        yield FieldViolation("grader" if spec.grader else "samples", f"says nothing about {dataset.format} rows")
    if dataset.format.value == "fields" and not (spec.task or spec.task_definition):
        yield FieldViolation("dataset", "has rows of named fields, which need a task's template: name a task")
