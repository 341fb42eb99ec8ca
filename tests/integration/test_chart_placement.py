"""Where the chart lets jobs train and engines run: what is asked of nodes, and that they have it."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as bounds
from hypothesis import strategies as st

from graft import settings
from graft.domain.placement import Demand, Node, count
from tests.support.chart import EXAMPLES, Object, helm, helm_path, of_kind, render, template

__all__ = ["helm"]

pytestmark = pytest.mark.integration

ON: Object = {"gpu": {"enabled": True}}


def _read(helm: Path, values: Path | Object, folder: Path) -> tuple[settings.Settings, list[Object]]:
    """The orchestrator's settings, and all objects."""
    objects = render(helm, values)
    file = folder / "graft.yaml"
    file.write_text(of_kind(objects, "ConfigMap")["r-graft-orchestrator"]["data"]["graft.yaml"])
    return settings.load({"GRAFT_HOME": str(folder), "GRAFT_CONFIG": str(file)}), objects


def test_groups_of_training_nodes_may_be_at_zero_and_the_orchestrator_is_told_what_they_grow_to(
    helm: Path, tmp_path: Path
) -> None:
    groups: Object = {
        "cpu": {"minReplicas": 0, "maxReplicas": 3, "resources": {"limits": {"cpu": "2500m"}}},
        "gpu": {"enabled": True, "maxReplicas": 1, "labels": {"pool": "on"}},
    }
    asked: Object = {"worker": {"cpus": 2}, "pools": {"yes": {"gpus": 0.5, "labelSelector": {"pool": "on"}}}}
    read, objects = _read(helm, {"baseModel": "smollm2-135m", "training": {"workerGroups": groups, **asked}}, tmp_path)
    spec = of_kind(objects, "RayCluster")["r-graft-training"]["spec"]
    assert spec["autoscalerOptions"]["version"] == "v2"
    rendered = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert [(group["minReplicas"], group["maxReplicas"]) for group in rendered.values()] == [(0, 3), (0, 1)]
    assert rendered["gpu"]["labels"] == {"pool": "on"}
    cpu, gpu = Node({"CPU": 3.0, "GPU": 0.0}), Node({"CPU": 4.0, "GPU": 1.0}, {"pool": "on"})
    assert read.training.largest == [cpu, cpu, cpu, gpu]
    assert read.training.demand("smollm2-135m") == Demand({"CPU": 2.0, "GPU": 1.0})
    assert count(read.training.largest, read.training.demand("yes")) == 2


def test_engines_of_every_base_model_have_nodes_that_hold_them(helm: Path, tmp_path: Path) -> None:
    from graft.serving.applications import check_nodes  # imports Ray

    for example in EXAMPLES:
        read, objects = _read(helm, example, tmp_path)
        groups = of_kind(objects, "RayService")["r-graft-inference"]["spec"]["rayClusterConfig"]["workerGroupSpecs"]
        nodes = [
            Node(
                {"CPU": 8.0, "GPU": float(resources.get("limits", {}).get("nvidia.com/gpu", 0))},
                group.get("labels", {}),
            )
            for group in groups
            for resources in [group["template"]["spec"]["containers"][0]["resources"]]
            for _ in range(group["replicas"])
        ]
        for base in {read.serving.base_model, *read.serving.pools}:
            check_nodes(base, read.serving.pool(base), nodes)
        assert read.training.largest
        for base in {read.serving.base_model, *read.training.pools}:
            assert count(read.training.largest, read.training.demand(base)) > 0, (example.stem, base)


@pytest.mark.parametrize(
    ("training", "gpus"),
    [
        ({}, 0),
        ({"workerGroups": ON}, 1),
        ({"workerGroups": ON, "worker": {"gpus": 0}}, 0),
        ({"workerGroups": ON, "worker": {"gpus": 0.5}}, 0.5),
        # Where its labels keep it away from the GPUs.
        ({"workerGroups": {**ON, "cpu": {"labels": {"pool": "a"}}}, "worker": {"labelSelector": {"pool": "a"}}}, 0),
        ({"workerGroups": {**ON, "cpu": {"labels": {"pool": "a"}}}, "worker": {"labelSelector": {"pool": "!a"}}}, 1),
        ({"workerGroups": {"gpu": {"enabled": True, "maxReplicas": 0}}}, 0),
    ],
)
def test_jobs_train_on_gpus_where_a_group_has_some_and_nothing_else_is_said(
    tmp_path: Path, training: Object, gpus: float
) -> None:
    read, _ = _read(helm_path("helm4"), {"baseModel": "smollm2-135m", "training": training}, tmp_path)
    assert read.training.worker.gpus == gpus


def test_the_examples_train_on_the_gpus_that_they_have_for_training(tmp_path: Path) -> None:
    asked = {}
    for example in EXAMPLES:
        read, objects = _read(helm_path("helm4"), example, tmp_path)
        groups = of_kind(objects, "RayCluster")["r-graft-training"]["spec"]["workerGroupSpecs"]
        containers = [group["template"]["spec"]["containers"][0] for group in groups]
        have = any("nvidia.com/gpu" in container["resources"]["limits"] for container in containers)
        gpus = [read.training.demand(base).resources["GPU"] for base in (read.serving.base_model, *read.training.pools)]
        assert all(bool(one) is have for one in gpus), example.stem
        asked[example.stem] = have
    assert asked.pop("multi-gpu-values")
    assert not any(asked.values())


LABELS = st.dictionaries(st.sampled_from(["pool", "zone"]), st.sampled_from(["a", "b"]), max_size=2)
SELECTORS = st.dictionaries(
    st.sampled_from(["pool", "zone"]), st.sampled_from(["a", "!a", "in(a, b)", "!in(a,b)", "!c"]), max_size=1
)
ASKED: dict[str, st.SearchStrategy[Any]] = {
    "cpus": st.sampled_from([1, 0.5, 3]),
    "gpus": st.sampled_from([0, 0.3, 1]),
    "labelSelector": SELECTORS,
}
NODES: dict[str, st.SearchStrategy[Any]] = {
    "gpus": st.integers(0, 2),
    "labels": LABELS,
    "resources": st.sampled_from(
        [{"limits": {"cpu": "1500m"}}, {"requests": {"cpu": 4}}, {"requests": {"memory": "1Gi"}}]
    ),
}
GROUP = st.fixed_dictionaries({**NODES, "enabled": st.booleans(), "maxReplicas": st.integers(0, 2)})
TRAINING = st.fixed_dictionaries(
    {"workerGroups": st.fixed_dictionaries({"own": GROUP, "other": GROUP})},
    optional={"worker": st.fixed_dictionaries({}, optional=ASKED), "pools": st.just({"one": {"gpus": 0}})},
)
INFERENCE = st.fixed_dictionaries(
    {
        "replicas": st.integers(1, 2),
        "replica": st.fixed_dictionaries({**ASKED, "gpus": st.sampled_from([0, 0.3, 1])}),
        "workers": st.fixed_dictionaries({**NODES, "replicas": st.integers(1, 2)}),
    }
)
BOUNDS = bounds(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def _nodes(group: Object, number: int) -> list[Node]:
    resources = group["resources"]
    cpus = {"1500m": 2.0, 4: 4.0, None: 1.0}[(resources.get("limits") or resources["requests"]).get("cpu")]
    return [Node({"CPU": cpus, "GPU": float(group["gpus"])}, group["labels"])] * number


def _demand(asked: Object) -> Demand:
    return Demand({"CPU": asked["cpus"], "GPU": asked["gpus"]}, asked["labelSelector"])


@pytest.mark.timeout(600)
@BOUNDS
@given(TRAINING)
def test_the_chart_refuses_workers_that_no_node_could_hold_and_no_others(training: Object) -> None:
    """As the orchestrator counts, of whose sum the chart has a copy."""
    groups = {name: {"minReplicas": 0, **group} for name, group in training["workerGroups"].items()}
    values = {**training, "workerGroups": {"cpu": {"enabled": False}, **groups}}
    told = template(helm_path("helm4"), {"baseModel": "smollm2-135m", "training": values})
    largest = [node for group in groups.values() if group["enabled"] for node in _nodes(group, group["maxReplicas"])]
    worker: Object = {"cpus": 1, "labelSelector": {}, **training.get("worker", {})}
    if "gpus" not in worker:
        worker["gpus"] = 1 if count(largest, Demand({"GPU": 1.0}, worker["labelSelector"])) else 0
    fits = [count(largest, _demand({**worker, **pool})) for pool in ({}, *training.get("pools", {}).values())]
    assert (told.returncode == 0) is all(fits), told.stderr
    assert ("which a worker asks for" in told.stderr) is not all(fits)


@pytest.mark.timeout(600)
@BOUNDS
@given(INFERENCE)
def test_the_chart_refuses_engines_that_the_nodes_have_no_room_for_and_no_others(inference: Object) -> None:
    told = template(helm_path("helm4"), {"baseModel": "smollm2-135m", "inference": inference})
    workers = inference["workers"]
    room = count(_nodes(workers, workers["replicas"]), _demand(inference["replica"]))
    assert (told.returncode == 0) is (room >= inference["replicas"]), told.stderr
    assert (f"have room for {room}" in told.stderr) is (room < inference["replicas"])


def test_one_gpu_may_hold_several_engines_and_workers(helm: Path) -> None:
    values: Object = {
        "baseModel": "smollm2-135m",
        "inference": {"replicas": 2, "replica": {"gpus": 0.5}, "workers": {"gpus": 1}},
    }
    assert template(helm, values).returncode == 0
    values["inference"]["replicas"] = 3
    told = template(helm, values)
    assert "inference.replica: 3 engines ask for 0 CPU, 0.5 GPU each" in told.stderr
    assert "have room for 2" in told.stderr
