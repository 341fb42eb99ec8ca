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
from graft.domain.errors import NotFound
from graft.domain.jobs import Job
from graft.domain.resources import BaseModel, Dataset
from graft.orchestrator.ports import PreparedData
from graft.training.derive import derive
from graft.training.memory import Memory, check_blocks, memory_bytes, read_shape
from graft.training.spec import RunSpec, StartFrom, run_spec, settled


class TokenizingPreparer:
    """The real Preparer."""

    def prepare(self, job: Job, base: BaseModel, dataset: Dataset, validation: Dataset | None) -> PreparedData:
        """Tokenises every row. Raises NotFound for a missing file, InvalidArgument for data that cannot be used."""
        training_stats = self._stats(job, base, dataset)
        validation_stats = self._stats(job, base, validation) if validation is not None else None
        resolved = derive(job.spec, base, training_stats)
        return PreparedData(training_stats, validation_stats, resolved, _memory(replace(job, resolved=resolved), base))

    def plan(
        self,
        job: Job,
        base: BaseModel,
        dataset: Dataset,
        validation: Dataset | None,
        output_dir: Path,
        start_from: StartFrom | None,
    ) -> RunSpec:
        """The run's specification from the job's resolved hyperparameters."""
        return run_spec(job, base, dataset, validation, output_dir, start_from=start_from)

    def _stats(self, job: Job, base: BaseModel, dataset: Dataset) -> DataStats:
        path = Path(dataset.uri)
        if not path.is_file():
            raise NotFound(
                f"The file of data set {dataset.id!r} is gone from the store's disk. Upload it again.",
                reason="DATASET_FILE_MISSING",
                metadata={"dataset": dataset.id},
            )
        asked = job.spec.hyperparameters
        context_tokens = asked.context_tokens or base.context_tokens
        return prepare(path, dataset.format, _tokenizer(base.path), context_tokens, asked.over_length_policy).stats


def _memory(job: Job, base: BaseModel) -> Memory:
    """What a worker needs. Raises InvalidArgument for more blocks than the base has."""
    shape = read_shape(Path(base.path))
    lora, last_layers = settled(job)
    check_blocks(shape, base.id, last_layers)
    return memory_bytes(shape, job.spec.tuning, lora, last_layers)


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
