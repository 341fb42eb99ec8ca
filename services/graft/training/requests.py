"""What a run has asked Ray for and was ended before it got: nobody else takes that back.

A placement group outlives the actor that made it while its job, here the orchestrator's session, goes on. Ray Train
has a cleaner for that, which learns of a group when its workers have started; one that still waits for nodes would go
on asking Ray's autoscaler for them, and would keep them.
"""

import time

import ray
from ray._private.state import state
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.util.placement_group import PlacementGroup, remove_placement_group

LOOK_SECONDS = 5.0
"""Ray knows within a second that an actor is dead, and with it the actors that it made."""
PAUSE_SECONDS = 0.1


def forget_requests() -> None:
    """Removes groups that wait, of this session's actors that are dead. To be called on the cluster, by an actor that
    has ended the one that made them; waits a moment until Ray knows."""
    job = bytes.fromhex(ray.get_runtime_context().get_job_id())
    deadline = time.monotonic() + LOOK_SECONDS
    while waiting := [group for group in _waiting() if group.creator_job_id == job]:
        dead = [group for group in waiting if group.creator_actor_dead]
        for group in dead:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
        if dead or time.monotonic() > deadline:
            return
        time.sleep(PAUSE_SECONDS)


def _waiting() -> list[PlacementGroupTableData]:
    # `ray.util.placement_group_table` leaves out who made a group.
    raw = state._connect_and_get_accessor().get_placement_group_table()
    groups = [PlacementGroupTableData.FromString(one) for one in raw]
    return [group for group in groups if group.state == PlacementGroupTableData.PENDING]
