"""The trials of a sweep, as the events of its job tell them."""

from typing import TYPE_CHECKING, Any

from graft.cli.output import as_dict, print_table

if TYPE_CHECKING:
    from graft.api.v1.fine_tuning_job_pb2 import FineTuningJobEvent

Trial = dict[str, Any]
"""Data of one: `trial` (its number), `learning_rate`, `rank`, `steps`, `best_validation_loss`, `state`, `best`."""


def trials_of(event: "FineTuningJobEvent") -> list[Trial]:
    """The trials that the event of a sweep's end tells; empty for every other event."""
    if "trials" not in event.data.fields:
        return []
    data = as_dict(event)["data"]
    return [{**trial, "best": trial["trial"] == data.get("best_trial")} for trial in data["trials"]]


def print_trials(trials: list[Trial]) -> None:
    """A table, in the trials' order, with the one that is kept marked."""
    print_table(
        ["TRIAL", "LEARNING RATE", "RANK", "STEPS", "HELD-OUT LOSS", "HOW IT ENDED", ""],
        [
            [
                f"{one['trial']:g}",
                f"{one['learning_rate']:g}",
                f"{one['rank']:g}",
                f"{one['steps']:g}",
                "" if one["best_validation_loss"] is None else f"{one['best_validation_loss']:.4f}",
                str(one["state"]).replace("_", " "),
                "best" if one["best"] else "",
            ]
            for one in trials
        ],
    )
