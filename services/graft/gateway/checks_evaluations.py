"""What an evaluation must satisfy before it is stored. All its faults are reported together."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from graft.data.reading import read_rows
from graft.data.tasks.definition import load
from graft.data.tasks.rows import FORMATS
from graft.domain.errors import FailedPrecondition, FieldViolation, GraftError, InvalidArgument, NotFound
from graft.domain.evaluations import METRICS, SAMPLES_NEEDED, Contestant, EvaluationSpec
from graft.domain.grading import check_grader
from graft.domain.jobs import JobSpec, Method
from graft.domain.resources import Dataset, DatasetFormat
from graft.gateway.checks import name_faults
from graft.gateway.checks_graders import check_rows, with_reference
from graft.gateway.checks_tasks import with_task
from graft.gateway.resolving import resolve
from graft.gateway.uploads import on_this_host
from graft.settings import Settings
from graft.store.protocol import Store

MAX_CONTESTANTS = 16
"""The intervals of a larger field say little: each is compared with each."""
MAX_SHOTS = 64
MAX_SAMPLES = 200
"""pass@100 with the estimator of Chen et al. 2021 (arXiv:2107.03374) samples 200."""


def measured_from(dataset: Dataset, *, graded: bool) -> str:
    """`answers`, `grades`, `pairs` or `texts`: what an evaluation, with or without a grader, finds on this data."""
    if graded and dataset.format is DatasetFormat.FIELDS:
        return "grades"
    found = {"graded_prompts": "grades", "preference": "pairs", "openai_preference": "pairs", "text": "texts"}
    return found.get(dataset.format.value, "answers")


async def check_evaluation(store: Store, project: str, spec: EvaluationSpec, settings: Settings) -> EvaluationSpec:
    """Returns the specification with versions in the place of aliases.

    Raises InvalidArgument with every fault. When the only faults are names that do not exist, raises NotFound.
    """
    missing: list[FieldViolation] = []
    wrong: list[FieldViolation] = []
    dataset: Dataset | None = None
    shown: Dataset | None = None
    try:
        dataset = await on_this_host(settings, await store.get_dataset(project, spec.dataset))
    except NotFound as error:
        missing.append(FieldViolation("dataset", error.message))
    if spec.shots_dataset is not None:
        try:
            shown = await on_this_host(settings, await store.get_dataset(project, spec.shots_dataset))
        except NotFound as error:
            missing.append(FieldViolation("shots_dataset", error.message))
    contestants: list[Contestant] = []
    learned: list[str] = []
    for index, contestant in enumerate(spec.contestants[:MAX_CONTESTANTS]):
        field = f"contestants[{index}].model"
        try:
            found = await resolve(store, project, contestant.model, settings.serving.base_model)
            contestants.append(replace(contestant, model=found.public_model))
            learned.append(found.task_definition)
        except (InvalidArgument, FailedPrecondition) as error:
            wrong.append(FieldViolation(field, error.message))
        except NotFound as error:
            missing.append(FieldViolation(field, error.message))
    wrong += [*_check_contestants(spec, contestants), *_check_numbers(spec), *_check_metrics(spec, dataset)]
    wrong += name_faults(spec.display_name)
    if dataset is not None and shown is not None and shown.digest == dataset.digest:  # the same file twice, perhaps
        wrong.append(FieldViolation("shots_dataset", "is the data that is asked: the answers would be shown"))
    spec, faults = await _with_task(spec, dataset, shown, learned)
    wrong += faults
    if dataset is not None and spec.grader is not None and not wrong:
        grader = with_reference(spec.grader, dataset, spec.task_definition)
        spec = replace(spec, grader=grader)
        wrong += await asyncio.to_thread(lambda: [*check_rows(grader, dataset, "grader")])
    if dataset is not None and not faults:
        wrong += await asyncio.to_thread(lambda: [*_check_shots(spec, dataset, shown)])
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
    spec: EvaluationSpec, dataset: Dataset | None, shown: Dataset | None, learned: list[str]
) -> tuple[EvaluationSpec, list[FieldViolation]]:
    """As a job's task is checked, its data being the data that is asked and that shots are taken from.

    Labels that are taken from the data are also those that the contestants `learned`: held-out data that lacks one
    would make another prompt than they were trained with, and leave less to confuse.
    """
    job = JobSpec("", spec.dataset, task=spec.task, task_definition=spec.task_definition)
    if dataset is not None and measured_from(dataset, graded=spec.grader is not None) == "grades":
        job = replace(job, method=Method.REINFORCEMENT)
    job, faults = await with_task(job, dataset, None, None, shown, learned)
    renamed = [replace(fault, field=fault.field.replace("training_dataset", "dataset")) for fault in faults]
    return replace(spec, task=job.task, task_definition=job.task_definition), renamed


def _check_shots(spec: EvaluationSpec, dataset: Dataset, shown: Dataset | None) -> Iterator[FieldViolation]:
    """Whether every contestant's shots can be shown before what is asked. Reads a row of graded prompts."""
    if measured_from(dataset, graded=spec.grader is not None) in ("pairs", "texts"):
        for index, contestant in enumerate(spec.contestants[:MAX_CONTESTANTS]):
            if contestant.shots:
                yield FieldViolation(
                    f"contestants[{index}].shots",
                    f"are {contestant.shots}, and of {dataset.format} rows the given texts are scored as they are, "
                    "without examples; use 0",
                )
        return
    most = max((contestant.shots for contestant in spec.contestants), default=0)
    if shown is None or not most:
        return
    if measured_from(shown, graded=False) != "answers":
        yield FieldViolation("shots_dataset", f"has {shown.format} rows, which hold no answers to show")
    elif _is_chat(spec, dataset) is not _is_chat(spec, shown):
        kinds = {True: "turns of a chat", False: "raw text"}
        yield FieldViolation(
            "shots_dataset",
            f"has prompts that are {kinds[_is_chat(spec, shown)]}, and those of the dataset are "
            f"{kinds[_is_chat(spec, dataset)]}: the one cannot be shown before the other; give rows of the same format",
        )
    elif most > shown.row_count:
        yield FieldViolation("shots_dataset", f"has {shown.row_count} rows, and {most} shots are asked for")


def _is_chat(spec: EvaluationSpec, dataset: Dataset) -> bool:
    """Whether a data set's prompts, or the first of graded ones, are turns of a chat rather than raw text."""
    if spec.task_definition and dataset.format in FORMATS:
        return load(spec.task_definition).is_chat
    if dataset.format is DatasetFormat.GRADED_PROMPTS and (path := Path(dataset.uri)).is_file():
        return not isinstance(next(read_rows(path), {}).get("prompt"), str)
    return dataset.format is not DatasetFormat.PROMPT_COMPLETION


def _check_contestants(spec: EvaluationSpec, resolved: list[Contestant]) -> Iterator[FieldViolation]:
    if not 1 <= len(spec.contestants) <= MAX_CONTESTANTS:
        yield FieldViolation("contestants", f"are {len(spec.contestants)}; give 1 to {MAX_CONTESTANTS}")
        return
    for index, contestant in enumerate(resolved):
        if contestant in resolved[:index]:
            yield FieldViolation(f"contestants[{index}]", f"{contestant.label} is there twice")
    for index, contestant in enumerate(spec.contestants):
        if not 0 <= contestant.shots <= MAX_SHOTS:
            yield FieldViolation(f"contestants[{index}].shots", f"{contestant.shots} is outside [0, {MAX_SHOTS}]")
    if spec.shots_dataset is None and any(contestant.shots for contestant in spec.contestants):
        yield FieldViolation("shots_dataset", "is required: contestants with shots take them from it")


def _check_numbers(spec: EvaluationSpec) -> Iterator[FieldViolation]:
    for name, value, most in (
        ("max_rows", spec.max_rows, 10_000_000),
        ("samples", spec.samples, MAX_SAMPLES),
        ("max_tokens", spec.max_tokens, 1_000_000),
    ):
        if not 0 <= value <= most:
            yield FieldViolation(name, f"{value} is outside [0, {most}]")


def _check_metrics(spec: EvaluationSpec, dataset: Dataset | None) -> Iterator[FieldViolation]:
    source = dataset and measured_from(dataset, graded=spec.grader is not None)
    if len(spec.metrics) > len(METRICS):
        yield FieldViolation("metrics", f"are {len(spec.metrics)}; there are {len(METRICS)} different ones")
        return
    for index, name in enumerate(spec.metrics):
        field = f"metrics[{index}]"
        if name not in METRICS:
            yield FieldViolation(field, f"{name!r} is not a metric; use: {', '.join(METRICS)}")
        elif name in spec.metrics[:index]:
            yield FieldViolation(field, f"{name!r} is named twice")
        elif dataset is not None and METRICS[name] != source:
            fitting = ", ".join(metric for metric, needed in METRICS.items() if needed == source)
            yield FieldViolation(field, f"{name!r} cannot be computed from {dataset.format} rows; use: {fitting}")
        elif (needed := SAMPLES_NEEDED.get(name, 1)) > (samples := spec.samples or 1):
            yield FieldViolation(field, f"{name!r} needs {needed} samples or more of each prompt; samples is {samples}")
    if dataset is None:
        return
    graded = source == "grades"
    if graded and spec.grader is None:
        yield FieldViolation("grader", "is required: it judges the answers to these prompts")
    if graded and spec.grader is not None:
        yield from check_grader(spec.grader)
    if not graded and (spec.grader is not None or spec.samples > 1):
        yield FieldViolation(
            "grader" if spec.grader else "samples",
            f"says nothing about {dataset.format} rows, whose own answers or texts are what is measured; graders judge "
            "graded prompts, and rows of fields through a task",
        )
    if dataset.format.value == "fields" and not (spec.task or spec.task_definition):
        yield FieldViolation("dataset", "has rows of named fields, which need a task's template: name a task")
