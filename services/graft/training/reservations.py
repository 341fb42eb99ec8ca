"""What runs have reserved of a cluster's resources: placement groups, each with its run's name, by which they are
given back whatever ended the run.

Ray keeps a placement group when the actor that made it dies, as long as the driver of its job lives: here, the
orchestrator. Does not know what is trained.
"""

import ray
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group


def workers_name(run: str) -> str:
    """Of the placement group of a run's workers."""
    return f"{run}-workers"


def trial_name(run: str, trial: int) -> str:
    """Of the placement group of a sweep's trial."""
    return f"{run}-trial-{trial}"


def give_back(run: str) -> None:
    """Removes every placement group of the run of that name. Ends what runs in them."""
    for found in placement_group_table().values():
        if found["name"].startswith(f"{run}-") and found["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(found["placement_group_id"]))))
