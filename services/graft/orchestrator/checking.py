"""Carries out checks of data sets that clients asked for: in a thread each, with the base model's own tokenizer.

Does not know jobs. A check that this process leaves unfinished stays pending and is made again by the next.
"""

import asyncio
from pathlib import Path

import structlog

from graft.data.analysis import Base, analyse
from graft.data.formats import FileReport, validate_file
from graft.data.tasks.definition import TaskDefinition, load
from graft.data.tokenizers import load_tokenizer
from graft.domain.errors import GraftError, Internal, Unavailable
from graft.domain.jobs import JobError
from graft.domain.reports import DatasetReport
from graft.domain.resources import BaseModel, Dataset
from graft.orchestrator.files import dataset_path, located
from graft.orchestrator.threads import call, to_the_end
from graft.storage import LOCAL, Storage
from graft.store.protocol import DatasetCheck, Store

log = structlog.get_logger()

CHECKS_AT_ONCE = 1
"""A check takes a core while it tokenizes, which training is short of."""


class Checker:
    """Makes the checks in the store, oldest first."""

    def __init__(self, store: Store, poll_seconds: float, storage: Storage = LOCAL) -> None:
        self._store = store
        self._storage = storage
        self._poll_seconds = poll_seconds
        self._down = False

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                for check in (await self._store.pending_dataset_checks())[:CHECKS_AT_ONCE]:
                    await self._carry_out(check)
                self._down = False
            except Exception as error:  # noqa: BLE001 - whatever the store raises, later checks must be made
                if not self._down:
                    self._down = True
                    log.warning("checks_wait", error=str(error), kind=type(error).__name__)
            await asyncio.sleep(self._poll_seconds)

    async def _carry_out(self, check: DatasetCheck) -> None:
        report: DatasetReport | None = None
        error: JobError | None = None
        try:
            base = await self._store.get_base_model(check.base_model)
            dataset = await self._store.get_dataset(check.project, check.dataset_id)
            held_out = await self._store.get_dataset(check.project, check.held_out_id) if check.held_out_id else None
            task = load(check.task_definition) if check.task_definition else None
            dataset = await call(located, self._storage, dataset)
            held_out = held_out and await call(located, self._storage, held_out)
            report = await call(examine, base, dataset, held_out, check.context_tokens, check.epochs, task)
        except Unavailable:
            raise  # the check stays
        except GraftError as refusal:
            error = JobError(refusal.code, refusal.reason, refusal.message)
        except Exception as defect:
            log.error("check_failed", check=check.id, dataset=check.dataset_id, exc_info=defect)
            error = JobError(
                Internal.code,
                "INTERNAL",
                f"A defect in Graft ended the check: {type(defect).__name__}. The orchestrator's log has the rest "
                f"under check {check.id}.",
            )
        await to_the_end(self._store.finish_dataset_check(check.id, report, error))
        log.info("dataset_check", dataset=check.dataset_id, project=check.project, refused=error and error.reason)


def examine(
    base: BaseModel,
    dataset: Dataset,
    held_out: Dataset | None,
    context_tokens: int | None,
    epochs: float,
    task: TaskDefinition | None = None,
) -> DatasetReport:
    """Measures a stored data set.

    Raises NotFound for a missing file, InvalidArgument for one that was changed or that the `task` does not fit.
    """
    path, file = _file(dataset)
    measured = Base(base.id, load_tokenizer(base.path), context_tokens or base.context_tokens, base.parameter_count)
    other = _file(held_out) if held_out is not None else None
    return analyse(path, file, base=measured, task=task, held_out=other, epochs=epochs)


def _file(dataset: Dataset) -> tuple[Path, FileReport]:
    path = dataset_path(LOCAL, dataset)
    return path, validate_file(path, dataset.format)
