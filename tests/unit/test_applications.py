"""What an application beside the first may take, and what it is called."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.schema import ApplicationStatus

from graft.domain.errors import FailedPrecondition, InvalidArgument, ResourceExhausted, Unavailable
from graft.domain.placement import Node
from graft.placement_settings import ReplicaPoolSettings
from graft.serving.app import EngineReplica, actor_options
from graft.serving.applications import GIB, PROCESSES_BYTES, Applications, check_memory, check_nodes
from graft.settings import ServingSettings
from tests.support.gateways import base_model

MODEL = dataclasses.replace(base_model(), id="large", size_bytes=3 * GIB)


def test_a_model_that_does_not_fit_is_refused_with_the_numbers() -> None:
    needed = 6 * GIB + 2 * GIB + PROCESSES_BYTES
    check_memory(MODEL, 2, needed)
    with pytest.raises(ResourceExhausted) as refused:
        check_memory(MODEL, 2, needed - 1)
    assert "takes 9.5 GiB (2 x 3.0 of weights, 2 of KV cache, 1.5 of processes), and 9.5 GiB are available" in str(
        refused.value
    )
    assert refused.value.metadata == {"needed_bytes": str(needed), "available_bytes": str(needed - 1)}


async def test_the_first_application_cannot_be_deployed_or_undeployed() -> None:
    applications = Applications("first", ServingSettings(), build=lambda _: pytest.fail("nothing may be built"))
    with pytest.raises(InvalidArgument):
        await applications.deploy(dataclasses.replace(MODEL, id="first"))
    for base in ("first", ""):
        with pytest.raises(InvalidArgument):
            await applications.undeploy(base)


async def test_applications_of_others_on_the_same_cluster_are_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    running = SimpleNamespace(status=ApplicationStatus.RUNNING)
    status = SimpleNamespace(applications=dict.fromkeys(("graft-engine", "graft-engine-large", "small"), running))
    monkeypatch.setattr("graft.serving.applications.serve.status", lambda: status)
    applications = Applications("first", ServingSettings(), build=lambda _: pytest.fail("nothing may be built"))
    assert [one.base_model for one in await applications.all()] == ["first", "large"]


async def test_one_that_is_ending_is_waited_for_and_not_taken_for_the_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    ending = SimpleNamespace(status=ApplicationStatus.DELETING)
    status = SimpleNamespace(applications={"graft-engine-large": ending})
    monkeypatch.setattr("graft.serving.applications.serve.status", lambda: status)
    applications = Applications("first", ServingSettings(), build=lambda _: pytest.fail("nothing may be built"))
    with pytest.raises(Unavailable) as refused:
        await applications.deploy(MODEL)
    assert refused.value.reason == "APPLICATION_ENDING"


def test_replicas_that_no_nodes_could_hold_are_refused_and_not_waited_for() -> None:
    nodes = [Node({"CPU": 8.0, "GPU": 1.0}, {"pool": "large"}), Node({"CPU": 8.0, "GPU": 4.0})]
    halves = ReplicaPoolSettings(num_replicas=2, gpus=0.5, label_selector={"pool": "large"})
    check_nodes("large", halves, nodes)
    with pytest.raises(FailedPrecondition) as refused:
        check_nodes("large", halves.model_copy(update={"num_replicas": 3}), nodes)
    assert "3 x 0.5 GPU on nodes with pool=large is declared for replicas of large" in refused.value.message
    assert "have 1 GPU on nodes with pool=large, room for 2" in refused.value.message
    with pytest.raises(FailedPrecondition, match="room for 0"):
        check_nodes("large", ReplicaPoolSettings(label_selector={"pool": "nowhere"}), nodes)
    check_nodes("small", ReplicaPoolSettings(num_replicas=9), nodes)


def test_a_pool_is_what_ray_serve_is_told_and_without_one_a_replica_reserves_nothing() -> None:
    pool = ReplicaPoolSettings(cpus=1, gpus=0.5, resources={"fast_disk": 1}, label_selector={"pool": "large"})
    assert actor_options(pool) == {
        "num_cpus": 1,
        "num_gpus": 0.5,
        "resources": {"fast_disk": 1},
        "label_selector": {"pool": "large"},
    }
    assert actor_options(ServingSettings().pool("any")) == {"num_cpus": 0, "num_gpus": 0, "resources": {}}


class _TwoReplicas:
    """The handle of a deployment of two, of which both answer."""

    def broadcast(self, _method: str) -> "_TwoReplicas":
        return self

    async def results_async(self, **_options: object) -> list[bytes]:
        return [b"one", b"two"]


async def test_all_replicas_of_a_pool_tell_what_they_hold_where_one_is_the_default() -> None:
    settings = ServingSettings(pools={"tiny": ReplicaPoolSettings(num_replicas=2)})
    replica: Any = SimpleNamespace(_settings=settings, _pool=settings.pool("tiny"), _handle=_TwoReplicas())
    assert len(await EngineReplica._held(replica)) == 2
