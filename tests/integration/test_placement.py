"""Training workers, trials and replicas on a Ray cluster of several raylets are where their declarations say.

By what Ray reports. The GPUs are numbers that Ray counts: nothing here has any.
"""

import asyncio
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from graft.domain.placement import Demand
from graft.domain.resources import BaseModel
from graft.internal.v1 import engine_pb2
from graft.settings import ServingSettings
from graft.storage import LOCAL
from graft.training.run import RayRuns
from graft.training.spec import ENDS, Report, RunSpec
from graft.training.sweep import SearchSpec, Trial
from tests.support.run_specs import tiny_run, validated_on
from tests.support.tiny_llama import make_tiny_llama

State = engine_pb2.Application.State
pytestmark = [pytest.mark.integration, pytest.mark.ray, pytest.mark.timeout(400)]

NODES: dict[str, dict[str, Any]] = {
    "training": {"num_cpus": 2, "resources": {"fast_disk": 1}},
    "large": {"num_cpus": 2, "num_gpus": 1},
    "small": {"num_cpus": 1},
}
"""By the label `pool` of each."""
SERVING = ServingSettings.model_validate(
    {
        "base_model": "tiny",
        "replica": {"label_selector": {"pool": "small"}},
        "pools": {
            "other": {"num_replicas": 2, "cpus": 0.5, "gpus": 0.5, "label_selector": {"pool": "!in(small, none)"}},
            "waiting": {"gpus": 0.5, "label_selector": {"pool": "large"}},
            "small": {},
        },
    }
)


@dataclass(frozen=True)
class Placed:
    """The cluster: runs on it, and its nodes' ids by pool."""

    runs: RayRuns
    ids: dict[str, str]
    cluster: Any

    def pool(self, node_id: str) -> str:
        return next(pool for pool, known in self.ids.items() if known == node_id)

    def actors(self, name: str) -> list[str]:
        """The pools where live actors are whose class has that name, one for each."""
        from ray.util.state import list_actors

        found = list_actors(filters=[("state", "=", "ALIVE")], limit=1000)
        return sorted(self.pool(actor.node_id) for actor in found if name in actor.class_name)


@pytest.fixture(scope="module")
def placed() -> Iterator[Placed]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": True, **small})
    try:
        ids = {"head": cluster.head_node.node_id}
        for pool, has in NODES.items():
            ids[pool] = cluster.add_node(**has, labels={"pool": pool}, **small).node_id
        ray.init(address=cluster.address, namespace="elsewhere", log_to_driver=False)
        yield Placed(RayRuns(), ids, cluster)
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> RunSpec:
    folder = tmp_path_factory.mktemp("placement")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n} is ", "completion": "a number"}) + "\n" for n in range(40)))
    return tiny_run(make_tiny_llama(folder / "base"), data, folder / "runs", **validated_on(data))


def _named(spec: RunSpec, job_id: str, demand: Demand, **changes: Any) -> RunSpec:
    return replace(spec, job_id=job_id, output_dir=f"{spec.output_dir}/{job_id}", demand=demand, **changes)


def _wait(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 180
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def _until(placed: Placed, spec: RunSpec, kinds: frozenset[str] = ENDS) -> Report:
    reports: list[Report] = []

    def there() -> bool:
        reports.extend(placed.runs.poll(spec.job_id, 1, len(reports)).reports)
        assert not reports or reports[-1].kind != "failed", reports[-1].data
        return any(report.kind in kinds for report in reports)

    _wait(there)
    return reports[-1]


def _pending() -> bool:
    from ray.util import placement_group_table

    return any(one["state"] == "PENDING" for one in placement_group_table().values())


def _free(resource: str) -> float:
    import ray

    return float(ray.available_resources().get(resource, 0.0))


def test_what_ray_tells_of_nodes_is_what_is_counted(placed: Placed) -> None:
    found = {node.labels.get("pool", "head"): node.resources for node in placed.runs.nodes()}
    assert set(found) == {"head", *NODES}
    assert (found["large"]["CPU"], found["large"]["GPU"], found["training"]["fast_disk"]) == (2.0, 1.0, 1.0)
    assert not found["head"].get("CPU")


def test_workers_are_on_the_nodes_of_their_labels_and_resources(placed: Placed, spec: RunSpec) -> None:
    from ray.util import placement_group_table

    demand = Demand({"CPU": 1.0, "fast_disk": 0.5}, {"pool": "in(training, none)"})
    mine = _named(spec, "ft-labels", demand, num_workers=2, total_steps=100_000)
    placed.runs.start(mine)
    _until(placed, mine, frozenset({"metrics"}))
    assert placed.runs.poll(mine.job_id, 1, 0).placed
    assert placed.actors("RayTrainWorker") == ["training", "training"]
    # Nothing else of the run keeps a node from being idle, then or later.
    own = ("_Run", "Fit", "TrainController", "SynchronizationActor", "AutoscalingCoordinator")
    assert [placed.actors(name) for name in own] == [["head"], ["head"], ["head"], ["head"], []]
    (group,) = [one for one in placement_group_table().values() if one["state"] == "CREATED"]
    assert [placed.pool(node) for node in group["bundles_to_node_id"].values()] == ["training", "training"]
    assert _free("fast_disk") == 0.0
    placed.runs.cancel(mine.job_id, 1)
    placed.runs.release(mine.job_id, 1)
    _wait(lambda: _free("fast_disk") == 1.0)


def test_two_workers_share_a_gpu_and_train_on_cpus_where_there_is_none_in_truth(placed: Placed, spec: RunSpec) -> None:
    mine = _named(spec, "ft-gpu", Demand({"CPU": 1.0, "GPU": 0.5}), num_workers=2, total_steps=100_000)
    placed.runs.start(mine)
    _until(placed, mine, frozenset({"metrics"}))
    assert placed.actors("RayTrainWorker") == ["large", "large"]
    assert _free("GPU") == 0.0
    placed.runs.cancel(mine.job_id, 1)
    placed.runs.release(mine.job_id, 1)
    _wait(lambda: _free("GPU") == 1.0)


def test_trials_of_a_sweep_are_on_the_nodes_of_their_labels(placed: Placed, spec: RunSpec) -> None:
    from ray.util import placement_group_table

    search = SearchSpec((Trial(1, 1e-3, 4, 8.0), Trial(2, 2e-3, 4, 8.0)), 3, 2.0, 2)
    demand = Demand({"CPU": 1.0}, {"pool": "training"})
    mine = _named(spec, "ft-trials", demand, search=search, eval_steps=50_000, total_steps=100_000)
    placed.runs.start(mine)
    _until(placed, mine, frozenset({"metrics"}))
    assert placed.runs.poll(mine.job_id, 1, 0).placed
    groups = [one for one in placement_group_table().values() if one["name"].startswith(f"{mine.name}-trial-")]
    nodes = [node for one in groups for node in one["bundles_to_node_id"].values() if node]
    assert nodes
    assert {placed.pool(node) for node in nodes} == {"training"}
    assert placed.actors("Search") == ["head"]
    placed.runs.cancel(mine.job_id, 1)
    placed.runs.release(mine.job_id, 1)
    _wait(lambda: placed.actors("Search") == [])


def test_a_run_whose_node_is_not_there_waits_unplaced_and_trains_when_it_joins(placed: Placed, spec: RunSpec) -> None:
    mine = _named(spec, "ft-later", Demand({"CPU": 1.0}, {"pool": "later"}), total_steps=2)
    placed.runs.start(mine)
    _wait(_pending)
    status = placed.runs.poll(mine.job_id, 1, 0)
    assert (status.alive, status.placed, status.reports) == (True, False, [])
    node = placed.cluster.add_node(num_cpus=1, labels={"pool": "later"}, object_store_memory=100 * 2**20)
    assert _until(placed, mine).kind == "finished"
    assert placed.runs.poll(mine.job_id, 1, 0).placed
    placed.runs.release(mine.job_id, 1)
    placed.cluster.remove_node(node)


def test_a_run_that_is_cancelled_while_it_waits_for_nodes_asks_for_them_no_longer(
    placed: Placed, spec: RunSpec
) -> None:
    mine = _named(spec, "ft-given-up", Demand({"CPU": 1.0}, {"pool": "nowhere"}))
    placed.runs.start(mine)
    _wait(_pending)
    placed.runs.cancel(mine.job_id, 1)
    placed.runs.release(mine.job_id, 1)
    _wait(lambda: not _pending())


class _Replica:
    """In the place of one with an engine; Serve is told of it all that it is told of those."""

    def __init__(self, *given: Any) -> None:
        self.given = given


def _base(name: str) -> BaseModel:
    return BaseModel(name, "nowhere", "sha256:b", 1, 1, 64, "", "", (), 8)


@pytest.fixture(scope="module")
def served(
    placed: Placed,  # noqa: ARG001 - it is connected
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[BaseModel], Any]]:
    """Ray Serve without its proxies on the cluster, and what makes an application of a base model."""
    from ray import serve

    from graft.serving.app import bind

    folder = tmp_path_factory.mktemp("served")
    serve.start(proxy_location="Disabled")
    yield lambda base: bind(SERVING, base, "http://nowhere", folder, LOCAL, replica=_Replica)
    serve.shutdown()


def test_replicas_of_two_base_models_are_in_their_pools_and_training_does_not_get_their_gpu(
    placed: Placed, spec: RunSpec, served: Callable[[BaseModel], Any]
) -> None:
    from ray import serve

    for name in ("tiny", "other"):
        serve.run(served(_base(name)), name=name, route_prefix=f"/{name}")
    # `!in(small, none)` passes two pools; only one of them has a GPU.
    assert placed.actors("ServeReplica:tiny:") == ["small"]
    assert placed.actors("ServeReplica:other:") == ["large", "large"]
    assert _free("GPU") == 0.0

    mine = _named(spec, "ft-beside", Demand({"CPU": 0.5, "GPU": 0.5}), total_steps=2)
    placed.runs.start(mine)
    _wait(_pending)
    assert not placed.runs.poll(mine.job_id, 1, 0).placed
    assert placed.actors("ServeReplica:other:") == ["large", "large"]
    serve.delete("other")
    assert _until(placed, mine).kind == "finished"
    placed.runs.release(mine.job_id, 1)


async def test_a_base_model_that_waits_for_room_keeps_no_other_from_being_deployed_and_can_be_undeployed(
    served: Callable[[BaseModel], Any],
) -> None:
    from graft.serving.applications import Applications

    applications = Applications("tiny", SERVING, served)

    async def states() -> dict[str, str]:
        return {one.base_model: State.Name(one.state) for one in await applications.all()}

    async def until(base: str, state: str) -> None:
        while (await states()).get(base) != state:  # noqa: ASYNC110 - Ray is watched; the test's time limit ends it
            await asyncio.sleep(0.1)

    await applications.deploy(_base("other"))
    await until("other", "STATE_RUNNING")
    await applications.deploy(_base("waiting"))
    await applications.deploy(_base("small"))
    await until("small", "STATE_RUNNING")
    assert (await states())["waiting"] == "STATE_STARTING"
    await applications.undeploy("waiting")
    await applications.undeploy("small")
    assert await states() == {"other": "STATE_RUNNING"}
