"""Domain types to OpenAI's objects, for the HTTP edge. What OpenAI has no field for stands under `graft`."""

from dataclasses import asdict
from datetime import datetime

from graft.domain.jobs import FINAL, Checkpoint, Event, Job, JobSpec, JobState, Memory, Method
from graft.domain.resources import Dataset
from graft.gateway.http.job_spec import METHOD_TYPES

PURPOSE = "fine-tune"

STATUSES = {
    JobState.VALIDATING: "validating_files",
    JobState.QUEUED: "queued",
    JobState.STARTING: "running",
    JobState.RUNNING: "running",
    JobState.REGISTERING: "running",
    JobState.EVALUATING: "running",
    JobState.SUCCEEDED: "succeeded",
    JobState.FAILED: "failed",
    JobState.CANCELLED: "cancelled",
    # OpenAI's type has no paused: the job holds nothing and waits, as in its queue.
    JobState.PAUSED: "queued",
}

_METRICS = {"validation_loss": "valid_loss"}
"""Graft's names of metrics where OpenAI's differ."""


def seconds(time: datetime | None) -> int | None:
    """A Unix timestamp in whole seconds."""
    return None if time is None else int(time.timestamp())


def file(found: Dataset) -> dict[str, object]:
    """A data set as `file`. It is always processed: one with bad lines is never stored."""
    return {
        "id": found.id,
        "object": "file",
        "bytes": found.size_bytes,
        "created_at": seconds(found.create_time),
        "expires_at": None,
        "filename": found.display_name,
        "purpose": PURPOSE,
        "status": "processed",
        "status_details": None,
        "graft": {"format": found.format.value, "row_count": found.row_count, "digest": found.digest},
    }


def job(found: Job) -> dict[str, object]:
    """A job as `fine_tuning.job`. Values that are still to be derived read `auto`."""
    spec = found.spec
    used = {one.name: one.value for one in found.resolved}
    hyperparameters = {
        "n_epochs": _whole(_first(spec.hyperparameters.epochs, used.get("epochs"), "auto")),
        "batch_size": _first(spec.hyperparameters.batch_size, used.get("batch_size"), "auto"),
        "learning_rate_multiplier": _whole(
            _first(spec.hyperparameters.learning_rate_multiplier, used.get("learning_rate_multiplier"), "auto")
        ),
    }
    ended = found.state in FINAL
    progress = found.progress
    remaining = progress.remaining_seconds if progress and found.state is JobState.RUNNING else None
    return {
        "id": found.id,
        "object": "fine_tuning.job",
        "created_at": seconds(found.create_time),
        "error": {"code": found.error.reason.lower(), "message": found.error.message, "param": None}
        if found.error
        else None,
        "estimated_finish": None if remaining is None else int(found.update_time.timestamp() + remaining),
        "fine_tuned_model": found.fine_tuned_model,
        "finished_at": seconds(found.end_time),
        "hyperparameters": hyperparameters,
        "integrations": [],
        "metadata": spec.metadata,
        "method": _method(spec, hyperparameters),
        "model": spec.base_model,
        "organization_id": found.project,
        "result_files": [],
        # OpenAI's type demands a number; 0 until the job has been given one.
        "seed": _first(spec.hyperparameters.seed, used.get("seed"), 0),
        "status": STATUSES[found.state],
        "suffix": spec.suffix,
        "trained_tokens": progress.trained_tokens if progress and ended else None,
        "training_file": spec.training_dataset,
        "validation_file": spec.validation_dataset,
        "graft": {
            "state": found.state.value,
            "attempt": found.attempt,
            "cancel_requested": found.cancel_requested,
            "tuning": spec.tuning.value,
            "lora": asdict(spec.lora),
            "last_layers": asdict(spec.last_layers),
            "served_as": spec.served_as.value if spec.served_as else None,
            "delta_rank": spec.delta_rank,
            "task": spec.task,
            "task_definition": spec.task_definition,
            "from_adapter": spec.from_adapter,
            "loss_on": spec.loss_on.value,
            "reinforcement": {name: value for name, value in asdict(spec.reinforcement).items() if name != "grader"},
            "hyperparameters": asdict(spec.hyperparameters),
            "sweep": None if spec.sweep is None else asdict(spec.sweep),
            "memory_estimate": _memory(found.memory) if found.memory else None,
            "resolved": [asdict(one) for one in found.resolved],
            "progress": asdict(progress) if progress else None,
            "metrics": found.metrics,
            "started_at": seconds(found.start_time),
        },
    }


def _memory(found: Memory) -> dict[str, int]:
    return {**asdict(found), "total_bytes": found.total_bytes}


def _method(spec: JobSpec, hyperparameters: dict[str, object]) -> dict[str, object]:
    kind = METHOD_TYPES[spec.method or Method.SUPERVISED]
    own: dict[str, object] = {"hyperparameters": hyperparameters}
    if spec.method is Method.PREFERENCE:
        own["hyperparameters"] = {**hyperparameters, "beta": spec.preference.beta or "auto"}
    if spec.method is Method.REINFORCEMENT and (grader := spec.reinforcement.grader) is not None:
        own["grader"] = {"type": grader.kind, **grader.settings}
    return {"type": kind, kind: own}


def _first(*values: object) -> object:
    return next(value for value in values if value is not None)


def _whole(value: object) -> object:
    """2.0 as 2, since OpenAI's type is a whole number; half an epoch stays half."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def event_id(job_id: str, sequence: int) -> str:
    """Ids of events hold their place, so that they serve as cursors."""
    return f"ftevent-{job_id}-{sequence}"


def event(job_id: str, found: Event) -> dict[str, object]:
    """An event as `fine_tuning.job.event`; `graft.type` tells states and checkpoints from other messages."""
    return {
        "id": event_id(job_id, found.sequence),
        "object": "fine_tuning.job.event",
        "created_at": seconds(found.create_time),
        "level": found.level.value,
        "message": found.message,
        "type": "metrics" if found.type == "metrics" else "message",
        "data": found.data,
        "graft": {"sequence": found.sequence, "type": found.type},
    }


def checkpoint_id(job_id: str, found: Checkpoint) -> str:
    """Unique over the attempts of a job."""
    return f"ftckpt-{job_id}-{found.attempt}-{found.step}"


def checkpoint(job_id: str, found: Checkpoint) -> dict[str, object]:
    """A checkpoint as `fine_tuning.job.checkpoint`. It cannot be served before it is registered, so that what stands
    in place of a model's name is where it lies."""
    return {
        "id": checkpoint_id(job_id, found),
        "object": "fine_tuning.job.checkpoint",
        "created_at": seconds(found.create_time),
        "fine_tuned_model_checkpoint": found.uri,
        "fine_tuning_job_id": job_id,
        "metrics": {"step": found.step, **{_METRICS.get(name, name): value for name, value in found.metrics.items()}},
        "step_number": found.step,
        "graft": {"attempt": found.attempt},
    }
