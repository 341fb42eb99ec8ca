"""STARTING, while Ray has no nodes for the workers: what is said meanwhile, and when it has been too long.

Ray's autoscaler sees the workers' request and adds nodes, where there is one. Does not know Ray.
"""

import time

from graft.domain.errors import Unavailable
from graft.domain.jobs import EventLevel
from graft.orchestrator.context import Context
from graft.orchestrator.room import worker_count

TELL_SECONDS = 30.0
"""A worker's process is there after some seconds on nodes that have room; what takes longer is told."""


class NodesWait:
    """One job's waiting, from now on."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._began = time.monotonic()
        self._asked = float("-inf")
        self._told = False

    async def look(self, placed: bool) -> None:
        """To be called at each poll. Raises Unavailable when no nodes have come in time."""
        context, job = self._context, self._context.job
        limit_seconds = context.parts.settings.training.nodes_wait_seconds
        waited_seconds = time.monotonic() - self._began
        workers = f"{worker_count(job)} x {context.parts.settings.training.demand(job.spec.base_model)}"
        if placed:
            if self._told:
                self._told = False
                await context.say(f"nodes-came-{job.attempt}", "The workers have their nodes.")
            return
        if waited_seconds > limit_seconds:
            raise Unavailable(
                f"Ray has not placed {workers} within {limit_seconds:g} s (training.nodes_wait_seconds). `ray "
                "status` on the cluster's head says what it waits for; create the job again when the nodes are there.",
                reason="NO_NODES",
            )
        if self._told or time.monotonic() - self._asked < context.parts.limits.retry_seconds:
            return
        self._asked = time.monotonic()
        if waited_seconds > TELL_SECONDS or not await context.room.has_nodes(job):
            self._told = True
            await context.say(
                f"nodes-{job.attempt}",
                f"Waiting for nodes that have {workers}: Ray is asked for them, for up to {limit_seconds:g} s.",
                level=EventLevel.WARN,
            )
