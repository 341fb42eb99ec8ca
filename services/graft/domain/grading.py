"""What turns an answer into a reward, as a job asks for it. How it is done is `graft.grading`'s."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class GraderSpec:
    """A verifiable reward: its kind, and the settings of that kind."""

    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
