"""Reads a job's data as training will: the base model's own tokenizer, the job's context and policy.

Tokenizers are all that this process needs of transformers.
"""

from dataclasses import replace
from pathlib import Path

from graft.data.prepare import DataStats, prepare
from graft.data.split import Split
from graft.data.tasks.definition import load
from graft.data.tokenizers import import_tokenizers, load_tokenizer
from graft.domain.jobs import DEFAULT_COMPLETION_TOKENS, Job, Memory, Method
from graft.domain.memory import memory_bytes, sharing_workers
from graft.domain.resources import BaseModel, Dataset
from graft.orchestrator.files import dataset_path
from graft.orchestrator.ports import PreparedData
from graft.settings import TrainingSettings
from graft.storage import LOCAL, Storage
from graft.training.derive import derive
from graft.training.memory import check_blocks, read_shape
from graft.training.spec import RunSpec, StartFrom, run_spec, settled

__all__ = ["TokenizingPreparer", "import_tokenizers"]


class TokenizingPreparer:
    """The real Preparer."""

    def __init__(
        self,
        engine_address: str = "",
        engine_base: str = "",
        engine_context_tokens: int | None = None,
        storage: Storage = LOCAL,
        training: TrainingSettings | None = None,
    ) -> None:
        """Where reinforcement samples, the base model that the service there starts with, and its longest prompt with
        an answer; None: as long as the base's context. `storage`: where the data lies. `training`: what workers ask of
        their nodes; None: the defaults."""
        self._training = training or TrainingSettings()
        self._storage = storage
        self._engine_address = engine_address
        self._engine_base = engine_base
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
        return run_spec(
            job,
            base,
            dataset,
            validation,
            output_dir,
            start_from=start_from,
            engine_address=self._engine_address,
            engine_base=self._engine_base,
            storage=self._storage,
            training=self._training,
        )

    def _stats(self, job: Job, base: BaseModel, dataset: Dataset, split: Split | None = None) -> DataStats:
        path = dataset_path(self._storage, dataset)
        asked = job.spec.hyperparameters
        context_tokens = asked.context_tokens or base.context_tokens
        if job.spec.method is Method.REINFORCEMENT:
            context_tokens -= job.spec.reinforcement.max_completion_tokens or DEFAULT_COMPLETION_TOKENS
        task = load(job.spec.task_definition) if job.spec.task_definition else None
        return prepare(
            path,
            dataset.format,
            load_tokenizer(base.path),
            context_tokens,
            asked.over_length_policy,
            split,
            method=job.spec.method or Method.SUPERVISED,
            loss_on=job.spec.loss_on,
            task=task,
        ).stats


def _memory(job: Job, base: BaseModel) -> Memory:
    """What a worker needs. Raises InvalidArgument for more blocks than the base has."""
    shape = read_shape(Path(base.path))
    lora, last_layers = settled(job)
    check_blocks(shape, base.id, last_layers)
    if job.spec.sweep and job.spec.sweep.ranks:
        lora = replace(lora, rank=max(job.spec.sweep.ranks))  # the trial that needs most
    return memory_bytes(shape, job.spec.tuning, lora, last_layers, sharing_workers(job.spec))
