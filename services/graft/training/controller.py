"""What Graft changes of Ray Train's controller: the run knows it, what it reserves has the run's name, and what it
reserves is all that it asks of the cluster.

Ray Train has a helper that removes the placement group of a controller that was killed, but tells it of the group only
once all workers are up: of a run that is ended before, the group would keep its places for good, and the next job would
wait for them.

Beside its placement group Ray Train has an actor ask the autoscaler for as much as the workers need. A controller that
is killed does not take that back: for three minutes nodes would be added, and kept, for a run that has ended. The
actor outlives all runs, and says every 20 s for the whole cluster what nodes are wanted beside pending work.
"""

from functools import partial
from typing import Any

import ray
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution import callback
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
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


class Reserving(FixedScalingPolicy):  # type: ignore[misc]  # Ray's class has no types
    """Asks for the workers' places by the pending placement group alone."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Tells the autoscaler nothing."""

    def _maybe_send_resource_request(self) -> None:
        """Tells the autoscaler nothing."""


class Trainer(TorchTrainer):  # type: ignore[misc]  # Ray's class has no types
    """Ray Train's, whose controller is `Reserving`."""

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        # Ray Train has no option for the policy.
        return super()._initialize_and_run_controller(**given | {"scaling_policy": Reserving(self.scaling_config)})
