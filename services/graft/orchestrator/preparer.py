"""Reads a job's data as training will: the base model's own tokenizer, the job's context and policy.

Tokenizers are all that this process needs of transformers.
"""

from pathlib import Path

from graft.data.prepare import DataStats, prepare
from graft.data.tokenizers import import_tokenizers, load_tokenizer
from graft.domain.errors import NotFound
from graft.domain.jobs import Job
from graft.domain.resources import BaseModel, Dataset
from graft.orchestrator.ports import PreparedData
from graft.training.derive import derive
from graft.training.spec import RunSpec, run_spec

__all__ = ["TokenizingPreparer", "import_tokenizers"]


class TokenizingPreparer:
    """The real Preparer."""

    def prepare(self, job: Job, base: BaseModel, dataset: Dataset, validation: Dataset | None) -> PreparedData:
        """Tokenises every row. Raises NotFound for a missing file, InvalidArgument for data that cannot be used."""
        training_stats = self._stats(job, base, dataset)
        validation_stats = self._stats(job, base, validation) if validation is not None else None
        return PreparedData(training_stats, validation_stats, derive(job.spec, base, training_stats))

    def plan(
        self, job: Job, base: BaseModel, dataset: Dataset, validation: Dataset | None, output_dir: Path
    ) -> RunSpec:
        """The run's specification from the job's resolved hyperparameters."""
        return run_spec(job, base, dataset, validation, output_dir)

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
        return prepare(path, dataset.format, load_tokenizer(base.path), context_tokens, asked.over_length_policy).stats
