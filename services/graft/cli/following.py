"""Follows a fine-tuning job to its end: live lines or JSON, what came of a sweep's trials, and the exit code."""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer

from graft.cli.output import Interrupted, as_dict, console, print_json, short_id
from graft.cli.trials import Trial, print_trials, trials_of

if TYPE_CHECKING:
    from graft.api.v1.fine_tuning_job_pb2 import FineTuningJob
    from graft.api.v1.fine_tuning_service_pb2 import WatchFineTuningJobResponse as Update
    from graft.client import Graft


def follow_job(graft: "Graft", job: "FineTuningJob", *, after: int = 0, as_json: bool) -> None:
    """Shows the job until it has ended, and exits with 1 unless it succeeded."""
    job_id = short_id(job.name)
    trials: list[Trial] = []
    try:
        for update in _told(graft, job, after, as_json=as_json):
            job, trials = update.fine_tuning_job, trials_of(update.event) or trials
    except KeyboardInterrupt:
        message = (
            f"Job {job_id} goes on. Follow it with `graft tune watch {job_id}`, "
            f"or end it with `graft tune cancel {job_id}`."
        )
        raise Interrupted(message, reason="INTERRUPTED", metadata={"job": job_id}) from None
    succeeded = job.state == job.STATE_SUCCEEDED
    if trials and not as_json:
        print_trials(trials)
    if succeeded and not as_json:
        print(f"{job.fine_tuned_model} is ready. Try it: graft chat {job.fine_tuned_model}")
    elif not as_json:
        from graft.cli.progress import state_word

        reason = f": {job.error.message}" if job.error.message else "."
        print(f"Job {job_id} has ended as {state_word(job.state)}{reason}", file=sys.stderr)
    raise typer.Exit(0 if succeeded else 1)


def _told(graft: "Graft", job: "FineTuningJob", after: int, *, as_json: bool) -> "Iterator[Update]":
    """The job after each of its events, which has been shown by then."""
    if as_json:
        for update in graft.watch_job(job.name, after):
            print_json(as_dict(update), line=True)
            yield update
        return
    from graft.cli.progress import JobsProgress

    with JobsProgress(console) as progress:
        progress.add(job.name, job.suffix or short_id(job.name))
        if after:
            progress.update(job.name, job)  # the next event may be long in coming
        for update in graft.watch_job(job.name, after):
            progress.update(job.name, update.fine_tuning_job, update.event)
            yield update
