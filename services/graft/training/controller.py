"""What Graft adds to Ray Train's controller: the run knows it, and what it reserves has the run's name.

Ray Train has a helper that removes the placement group of a controller that was killed, but tells it of the group only
once all workers are up: of a run that is ended before, the group would keep its places for good, and the next job would
wait for them.
"""

from functools import partial
from typing import Any

import ray
from ray.train.v2._internal.execution import callback
from ray.train.v2._internal.execution.worker_group import worker_group

from graft.training.reservations import workers_name


class Led(callback.WorkerGroupCallback):  # type: ignore[misc]  # Ray's class has no types
    """Called in the controller's process before it reserves anything."""

    def __init__(self, run: Any, name: str) -> None:
        """`run`: the run's actor, with the method `led_by`; `name`: its name."""
        self._run = run
        self._name = name

    def before_worker_group_start(self, worker_group_context: Any) -> None:  # noqa: ARG002 - Ray Train's signature
        """Raises what the run raises when it has ended: nothing is reserved then."""
        ray.get(self._run.led_by.remote(ray.get_runtime_context().current_actor))
        # Ray Train has no option for the name of its group. A second group of workers comes here again.
        reserve = worker_group.placement_group
        reserve = reserve.func if isinstance(reserve, partial) else reserve
        worker_group.placement_group = partial(reserve, name=workers_name(self._name))
