"""The host that has Ray's head dies in the middle of a job, and another machine takes its place.

Nothing is lost but the attempt, and nothing is started by hand but what that machine starts when it boots.
"""

import time

import pytest

from graft.domain.errors import Unavailable
from tests.support.healing import Note
from tests.support.host_cluster import BASE, HostCluster, seconds_until
from tests.support.host_jobs import alive, ask, create, succeeded, told, trains, versions
from tests.support.processes import held
from tests.support.whole_stack import eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(580)]


def test_a_lost_head_costs_no_job_no_version_and_no_adapter(cluster: HostCluster, dataset: str, note: Note) -> None:
    head, orchestrator = cluster.host("head"), cluster.orchestrator()
    cluster.publish("kept", 0)
    kept = f"{BASE}:kept@1"
    answer = ask(cluster, kept).text
    name = create(cluster, dataset, "headless", workers=1)
    trains(cluster, name)

    with held(cluster.training_workers()):
        head.kill()
    killed = time.monotonic()
    with pytest.raises(Unavailable) as refused:
        ask(cluster)
    refused_seconds = time.monotonic() - killed
    assert refused.value.reason == "ENGINE_STARTING"
    assert alive(cluster, name).attempt == 1

    cluster.replace_head()
    back = time.monotonic()
    waits = "The training cluster is not available yet"
    eventually(lambda: told(cluster, name), lambda said: any(waits in message for message in said), 180, waits)
    noticed_seconds = time.monotonic() - killed
    seconds_until(lambda: ask(cluster, kept), 300, f"{kept} answers")
    answered_seconds = time.monotonic() - back
    job = succeeded(cluster, name)
    trained_seconds = time.monotonic() - back
    assert job.attempt == 2
    assert any("Trying again." in message for message in told(cluster, name)), told(cluster, name)
    assert versions(cluster, "headless") == ["1"]
    cluster.wait_for_replicas(300)
    assert ask(cluster, kept).text == answer
    assert ask(cluster, f"{BASE}:headless@1").text
    assert cluster.orchestrator() == orchestrator  # it has made a new session by itself
    note(
        "inference: the host of Ray's head dead",
        error_seconds=refused_seconds,
        told=refused.value.reason,
        heal_seconds=answered_seconds,
    )
    note(
        "a job: the host of Ray's head dead",
        error_seconds=noticed_seconds,
        told="attempt 2",
        heal_seconds=trained_seconds,
    )
