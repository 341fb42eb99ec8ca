"""The nodes of the Ray cluster that this process is connected to, as `graft.domain.placement` counts them."""

import ray

from graft.domain.placement import Node


def nodes() -> list[Node]:
    """Those that live, each with all that it has, in use too."""
    return [Node(node["Resources"], node["Labels"]) for node in ray.nodes() if node["Alive"]]
