"""Carries out checks of data sets that clients asked for: in a thread each, with the base model's own tokenizer.

Does not know jobs. A check that this process leaves unfinished stays pending and is made again by the next.
"""

import asyncio
from pathlib import Path

import structlog

from graft.data.analysis import Base, analyse
from graft.data.formats import FileReport, validate_file
from graft.data.tokenizers import load_tokenizer
from graft.domain.errors import GraftError, Internal, Unavailable
from graft.domain.jobs import JobError
from graft.domain.reports import DatasetReport
from graft.domain.resources import BaseModel, Dataset
from graft.orchestrator.files import dataset_path
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
            report = await call(examine, self._storage, base, dataset, held_out, check.context_tokens, check.epochs)
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
    storage: Storage,
    base: BaseModel,
    dataset: Dataset,
    held_out: Dataset | None,
    context_tokens: int | None,
    epochs: float,
) -> DatasetReport:
    """Measures a stored data set. Raises NotFound for a missing file, InvalidArgument for one that was changed."""
    path, file = _file(storage, dataset)
    measured = Base(base.id, load_tokenizer(base.path), context_tokens or base.context_tokens, base.parameter_count)
    other = _file(storage, held_out) if held_out is not None else None
    return analyse(path, file, base=measured, held_out=other, epochs=epochs)


def _file(storage: Storage, dataset: Dataset) -> tuple[Path, FileReport]:
    path = dataset_path(storage, dataset)
    return path, validate_file(path, dataset.format)
