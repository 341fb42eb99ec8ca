"""Base models that are served beside the stack's first one, each by an engine of its own."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from graft.domain.jobs import JobError
from graft.domain.names import parse_model


class DeploymentState(StrEnum):
    """How far a deployment is. STOPPING ends with its row."""

    STARTING = "STARTING"
    READY = "READY"
    FAILED = "FAILED"
    STOPPING = "STOPPING"


@dataclass(frozen=True)
class Deployment:
    """One of them. What it serves never changes."""

    base_model: str
    """Its id: what requests call it, and its base model's id in the catalogue. Unique in the whole installation, since
    base models are shared by all projects."""
    project: str
    """Who asked for it."""
    source: str
    """A base model of the catalogue (then the same as `base_model`), or a full model's version `base:adapter@3`."""
    create_time: datetime
    state: DeploymentState = DeploymentState.STARTING
    error: JobError | None = None
    """Why it is FAILED."""

    @property
    def is_version(self) -> bool:
        """True for a full model that a job made, false for a base model of the catalogue."""
        return parse_model(self.source).adapter is not None


def full_model_source(project: str, model: str) -> str:
    """What the catalogue says of a deployed full model's origin. Names the project: two may have a `base:adapter@3`."""
    return f"full model {model} of project {project}"


def default_deployment_id(base: str, adapter: str, version: int) -> str:
    """`base-adapter-3`: an id, as names with `:` and `@` cannot be one."""
    return f"{base}-{adapter}-{version}"
