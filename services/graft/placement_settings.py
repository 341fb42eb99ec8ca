"""What processes on Ray ask of their nodes, and the nodes that there may be: the sections of `graft.settings` that
declare placement. Does not know which section has them."""

from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from graft.domain.placement import Demand, Node, is_selector


def _selector(value: str) -> str:
    if not is_selector(value):
        raise ValueError(f"{value!r} is no selector of a label: write value, !value, in(a, b) or !in(a, b)")
    return value


_LabelSelector = dict[str, Annotated[str, AfterValidator(_selector)]]
_Amounts = dict[str, Annotated[float, Field(gt=0)]]


class _Placement(BaseModel):
    """What one process on Ray asks of its node."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    resources: _Amounts = Field(default_factory=dict)
    """Of the cluster's own resources (`ray start --resources`), by name."""
    label_selector: _LabelSelector = Field(default_factory=dict)
    """What its node's labels (`ray start --labels`) have to be: `{pool: large}`, `!spot`, `in(a, b)`, `!in(a, b)`."""

    @field_validator("resources")
    @classmethod
    def _is_custom(cls, value: dict[str, float]) -> dict[str, float]:
        if named := value.keys() & {"CPU", "GPU"}:
            raise ValueError(f"{', '.join(sorted(named))} is set by cpus and gpus")
        return value


_PlacementT = TypeVar("_PlacementT", bound=_Placement)


def overridden(default: _PlacementT, pool: _Placement | None) -> _PlacementT:
    """The default with every field that the pool gives."""
    given = {} if pool is None else {name: getattr(pool, name) for name in pool.model_fields_set}
    return default.model_copy(update=given)


class ReplicaSettings(_Placement):
    """What a replica asks of its node."""

    cpus: float = Field(default=0, ge=0)
    """Reserved, not a limit: an engine uses every core of its node. 0: the cores serve training and inference alike. A
    tenth of one would keep the last training worker that the orchestrator has counted on out of a small cluster."""
    gpus: float = Field(default=0, ge=0, le=1)
    """Of one GPU: 0.5 lets two share it, and gives each engine that part of its memory. 0: an engine on a node with
    GPUs uses the first one all the same, and nobody is told."""

    @property
    def demand(self) -> Demand:
        """In Ray's words."""
        asked = {"CPU": self.cpus, "GPU": self.gpus, **self.resources}
        return Demand({name: amount for name, amount in asked.items() if amount}, dict(self.label_selector))


class ReplicaPoolSettings(ReplicaSettings):
    """Of one base model; what is left out is as in `serving.replica` and `serving.num_replicas`."""

    num_replicas: int = Field(default=1, ge=1)


class WorkerSettings(_Placement):
    """What a training worker, or a trial of a sweep, asks of its node."""

    cpus: float = Field(default=1, gt=0)
    """Reserved, not a limit: workers share all cores of their node by what each has reserved."""
    gpus: float | None = Field(default=None, ge=0, le=1)
    """Of one GPU: 0.5 lets two share it. 0: sees none. None: reserves none and uses the one that its node may have,
    which is for machines where nobody else does."""

    @property
    def demand(self) -> Demand:
        """In Ray's words."""
        gpus = {} if self.gpus is None else {"GPU": self.gpus}
        return Demand({"CPU": self.cpus, **gpus, **self.resources}, dict(self.label_selector))


class WorkerGroupSettings(BaseModel):
    """Nodes that are alike, of which Ray's autoscaler may add some."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_nodes: int = Field(ge=0, le=1000)
    """With those that are there."""
    cpus: float = Field(gt=0)
    gpus: float = Field(default=0, ge=0)
    resources: _Amounts = Field(default_factory=dict)
    labels: dict[str, str] = Field(default_factory=dict)

    @property
    def nodes(self) -> list[Node]:
        """All that there can be."""
        return [Node({"CPU": self.cpus, "GPU": self.gpus, **self.resources}, dict(self.labels))] * self.max_nodes
