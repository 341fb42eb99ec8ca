"""Jobs on `tests.support.host_cluster`, long enough to lose a host in the middle of one, and how far they are."""

from typing import Any

from graft.api.v1 import fine_tuning_job_pb2
from tests.support.host_cluster import BASE, HostCluster
from tests.support.whole_stack import eventually

STEPS = 300
"""Some seconds of training: a cable is pulled in the middle of it, and nobody takes a step meanwhile."""


def create(cluster: HostCluster, dataset: str, suffix: str, workers: int = 2) -> str:
    """A job; its name."""
    hyperparameters = {"max_steps": STEPS, "batch_size": 4, "num_workers": workers, "learning_rate": 0.02}
    name: str = cluster.graft.create_job(BASE, dataset, suffix=suffix, hyperparameters=hyperparameters).name
    return name


def alive(cluster: HostCluster, name: str) -> fine_tuning_job_pb2.FineTuningJob:
    """The job, which has not failed."""
    job = cluster.graft.job(name)
    assert job.state != job.STATE_FAILED, job.error.message
    return job


def trains(cluster: HostCluster, name: str) -> fine_tuning_job_pb2.FineTuningJob:
    """The job, once it has taken a step, and before the last."""
    job = eventually(lambda: alive(cluster, name), lambda job: job.progress.step > 0, 240, f"{name} takes a step")
    assert job.state == job.STATE_RUNNING, job
    return job


def succeeded(cluster: HostCluster, name: str) -> fine_tuning_job_pb2.FineTuningJob:
    """The job at its end."""
    return eventually(
        lambda: alive(cluster, name), lambda job: job.state == job.STATE_SUCCEEDED, 400, f"{name} succeeds"
    )


def told(cluster: HostCluster, name: str) -> list[str]:
    """What the job's events say so far."""
    return [event.message for event in cluster.graft.job_events(name)]


def versions(cluster: HostCluster, adapter: str) -> list[str]:
    """Of an adapter of the tiny base."""
    return [version.name.rpartition("/")[2] for version in cluster.graft.adapter_versions(f"{BASE}:{adapter}")]


def ask(cluster: HostCluster, model: str = BASE) -> Any:
    """One short answer."""
    return cluster.graft.generate(model, prompt="Number 3?", max_tokens=4)
