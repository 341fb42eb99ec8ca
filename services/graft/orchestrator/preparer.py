"""Reads a job's data as training will: the base model's own tokenizer, the job's context and policy.

Owns the import of transformers, whose tokenizers are all that this process needs of it.
"""

import importlib
import sys
import threading
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from graft.data.prepare import DataStats, prepare
from graft.data.split import Split
from graft.domain.errors import NotFound
from graft.domain.jobs import Job, Method
from graft.domain.resources import BaseModel, Dataset
from graft.orchestrator.ports import PreparedData
from graft.training.derive import DEFAULT_COMPLETION_TOKENS, derive
from graft.training.spec import RunSpec, run_spec


class TokenizingPreparer:
    """The real Preparer."""

    def __init__(self, engine_address: str = "", engine_context_tokens: int | None = None) -> None:
        """Where reinforcement samples, and the longest prompt with its answer there; None: as long as the base's."""
        self._engine_address = engine_address
        self._engine_context_tokens = engine_context_tokens

    def prepare(self, job: Job, base: BaseModel, dataset: Dataset, validation: Dataset | None) -> PreparedData:
        """Tokenises every row. Raises NotFound for a missing file, InvalidArgument for data that cannot be used."""
        if job.spec.method is Method.REINFORCEMENT and self._engine_context_tokens is not None:
            base = replace(base, context_tokens=min(base.context_tokens, self._engine_context_tokens))
        fraction = job.spec.hyperparameters.validation_fraction
        if fraction:
            training_stats = self._stats(job, base, dataset, Split(fraction, held_out=False))
            validation_stats: DataStats | None = self._stats(job, base, dataset, Split(fraction, held_out=True))
        else:
            training_stats = self._stats(job, base, dataset)
            validation_stats = self._stats(job, base, validation) if validation is not None else None
        return PreparedData(training_stats, validation_stats, derive(job.spec, base, training_stats))

    def plan(
        self, job: Job, base: BaseModel, dataset: Dataset, validation: Dataset | None, output_dir: Path
    ) -> RunSpec:
        """The run's specification from the job's resolved hyperparameters."""
        return run_spec(job, base, dataset, validation, output_dir, engine_address=self._engine_address)

    def _stats(self, job: Job, base: BaseModel, dataset: Dataset, split: Split | None = None) -> DataStats:
        path = Path(dataset.uri)
        if not path.is_file():
            raise NotFound(
                f"The file of data set {dataset.id!r} is gone from the store's disk. Upload it again.",
                reason="DATASET_FILE_MISSING",
                metadata={"dataset": dataset.id},
            )
        asked = job.spec.hyperparameters
        context_tokens = asked.context_tokens or base.context_tokens
        if job.spec.method is Method.REINFORCEMENT:
            context_tokens -= job.spec.reinforcement.max_completion_tokens or DEFAULT_COMPLETION_TOKENS
        return prepare(
            path,
            dataset.format,
            _tokenizer(base.path),
            context_tokens,
            asked.over_length_policy,
            split,
            method=job.spec.method or Method.SUPERVISED,
            loss_on=job.spec.loss_on,
        ).stats


def import_tokenizers() -> None:
    """Imports transformers without torch, for a process that computes nothing: it spares 400 MB and three seconds.

    Call it before other threads start. transformers remembers that it found no torch; whoever imports torch later
    gets it.
    """
    hidden: dict[str, Any] = sys.modules
    hidden["torch"] = None
    try:
        importlib.import_module("transformers").AutoTokenizer  # noqa: B018 - its modules are imported on first use
    finally:
        del hidden["torch"]


def _tokenizer(path: str) -> Any:
    # One thread at a time: while one imports transformers, another finds the module half made.
    with _loading:
        return _load_tokenizer(path)


_loading = threading.Lock()


@lru_cache(maxsize=4)
def _load_tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, local_files_only=True)
