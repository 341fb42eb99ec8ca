"""What a worker or a replica asks of a node, and how many of them nodes have room for. Pure.

Resources and label selectors are Ray's: `CPU`, `GPU` and the cluster's own names; `value`, `!value`, `in(a, b)` and
`!in(a, b)`. Ray alone places: what is counted here is whether it could.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

EPSILON = 1e-6
"""Ray counts in ten-thousandths."""
_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
_SELECTOR = re.compile(rf"(?P<negated>!?)(?:in\((?P<values>{_LABEL}(?:, ?{_LABEL})*)\)|(?P<value>{_LABEL}))")
"""As `ray._private.label_utils` has it."""


@dataclass(frozen=True)
class Demand:
    """Of one worker or replica."""

    resources: Mapping[str, float] = field(default_factory=dict)
    """None of one is another thing than one that is not named: it is not to be used."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """By label, the selector that its node has to pass."""

    def __str__(self) -> str:
        """Such as `1 CPU and 0.5 GPU on nodes with pool=large`."""
        return amounts({name: amount for name, amount in self.resources.items() if amount}) + self.where

    @property
    def where(self) -> str:
        """` on nodes with pool=large`, or nothing."""
        labels = ", ".join(f"{name}={selector}" for name, selector in self.labels.items())
        return f" on nodes with {labels}" if labels else ""


@dataclass(frozen=True)
class Node:
    """One that is there, or could be."""

    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """Workers or replicas that are alike."""

    count: int
    demand: Demand


def amounts(resources: Mapping[str, float]) -> str:
    """Such as `1 CPU and 0.5 GPU`."""
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items()) or "nothing"


def is_selector(text: str) -> bool:
    """Whether Ray takes it."""
    return _SELECTOR.fullmatch(text) is not None


def passes(selector: str, value: str | None) -> bool:
    """Whether a node whose label has that value, None without the label, passes. ValueError for what Ray refuses."""
    found = _SELECTOR.fullmatch(selector)
    if found is None:
        raise ValueError(f"{selector!r} is no selector.")
    wanted = [one.strip() for one in found["values"].split(",")] if found["values"] else [found["value"]]
    return (value in wanted) is not bool(found["negated"])


def suits(node: Node, demand: Demand) -> bool:
    """Whether the node's labels pass every selector; it need not have room."""
    return all(passes(selector, node.labels.get(name)) for name, selector in demand.labels.items())


def room(node: Node, demand: Demand) -> int:
    """How many fit on the node."""
    if not suits(node, demand):
        return 0
    asked = {name: amount for name, amount in demand.resources.items() if amount > 0}
    if not asked:
        raise ValueError("Something that asks for nothing fits any number of times.")
    return min(int((node.resources.get(name, 0.0) + EPSILON) // amount) for name, amount in asked.items())


def count(nodes: Iterable[Node], demand: Demand) -> int:
    """How many fit on the nodes."""
    return sum(room(node, demand) for node in nodes)


def left(nodes: Iterable[Node], claims: Iterable[Claim]) -> list[Node]:
    """What the claims leave of each node. What of a claim does not fit anywhere takes nothing.

    The choosiest go first, and each where it leaves the least of other resources: as a scheduler would that knew all.
    """
    free = list(nodes)
    order = [claim for claim in claims if any(claim.demand.resources.values())]
    order.sort(key=lambda claim: (len(claim.demand.labels), len(claim.demand.resources)), reverse=True)
    for claim in order:
        remaining, asked = claim.count, claim.demand.resources
        for index in sorted(range(len(free)), key=lambda at: len(free[at].resources.keys() - asked.keys())):
            node = free[index]
            taken = min(remaining, room(node, claim.demand))
            if taken > 0:
                used = {name: have - taken * asked.get(name, 0.0) for name, have in node.resources.items()}
                free[index] = Node(used, node.labels)
                remaining -= taken
    return free


def total(nodes: Iterable[Node], demand: Demand) -> dict[str, float]:
    """What nodes that suit have of each resource that is asked for."""
    suiting = [node for node in nodes if suits(node, demand)]
    asked = [name for name, amount in demand.resources.items() if amount]
    return {name: sum(node.resources.get(name, 0.0) for node in suiting) for name in asked}
