"""Data sets, base models and adapters as Graft's parts pass them to each other."""

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from graft.domain.jobs import ServedAs
from graft.domain.shapes import Shape


class DatasetFormat(StrEnum):
    """Row layout of a data set. What each looks like is in `graft.data.layouts`."""

    MESSAGES = "messages"
    PROMPT_COMPLETION = "prompt_completion"
    TEXT = "text"
    QUESTION_ANSWER = "question_answer"
    ALPACA = "alpaca"
    SHAREGPT = "sharegpt"
    PREFERENCE = "preference"
    OPENAI_PREFERENCE = "openai_preference"
    GRADED_PROMPTS = "graded_prompts"
    FIELDS = "fields"
    """Named fields for a task's template. Never recognised, only declared."""


@dataclass(frozen=True)
class Dataset:
    """An uploaded data set: JSONL, CSV or Parquet, immutable. `uri` is an fsspec URL or path that only services see."""

    id: str
    project: str
    display_name: str
    format: DatasetFormat
    row_count: int
    size_bytes: int
    digest: str
    uri: str
    create_time: datetime
    labels: dict[str, tuple[str, ...]] | None = None
    """Of rows that a task's template reads, the different values of each field, as `graft.data.labels` counts them.
    None where an older Graft stored the data set, which did not."""


@dataclass(frozen=True)
class BaseModel:
    """A base model that can be trained on and served. `path` is a Hugging Face folder in safetensors."""

    id: str
    path: str
    digest: str
    parameter_count: int
    size_bytes: int
    context_tokens: int
    license: str
    source: str
    target_modules: tuple[str, ...]
    """Names of its linear layers, without the LM head, for example `q_proj`."""
    max_lora_rank: int
    project: str = ""
    """Whose it is alone: a full model that one project trained. Empty for all others, which every project sees."""
    shape: Shape | None = None
    """None where `config.json` does not tell all of it."""


@dataclass(frozen=True)
class AdapterVersion:
    """One immutable version in the registry, as the read model and the registry know it.

    Its content, digest and size are those of the adapter that is served, or of the model where that is what is served.
    """

    project: str
    base_model: str
    adapter: str
    version: int
    digest: str
    base_model_digest: str
    dataset_digest: str
    job_id: str
    rank: int
    size_bytes: int
    mlflow_run_id: str
    create_time: datetime
    metrics: dict[str, float] = field(default_factory=dict)
    served_as: ServedAs = ServedAs.ADAPTER
    task_definition: str = ""
    """YAML of the task that it was trained with; empty without one."""

    @property
    def model(self) -> str:
        """`base:adapter@version`."""
        return f"{self.base_model}:{self.adapter}@{self.version}"


@dataclass(frozen=True)
class Adapter:
    """A named line of versions, and the aliases into it."""

    project: str
    base_model: str
    adapter: str
    aliases: dict[str, int]
    newest_version: int
    create_time: datetime


@dataclass(frozen=True)
class RegistrySnapshot:
    """All of Graft's adapters as the registry tells them at one moment."""

    adapters: tuple[Adapter, ...]
    versions: tuple[AdapterVersion, ...]
