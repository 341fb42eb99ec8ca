"""What nodes have room for, and where the settings say that training and replicas go."""

from pathlib import Path

import pytest

from graft import settings
from graft.domain.errors import InvalidArgument
from graft.domain.placement import Claim, Demand, Node, count, left, passes, total
from graft.orchestrator.room import reserved

SMALL = Node({"CPU": 2.0}, {"pool": "small"})
LARGE = Node({"CPU": 4.0, "GPU": 2.0}, {"pool": "large", "zone": "a"})


def loaded(folder: Path, text: str = "", **variables: str) -> settings.Settings:
    (folder / "graft.yaml").write_text(text)
    return settings.load({"GRAFT_HOME": str(folder), **variables})


@pytest.mark.parametrize(
    ("selector", "value", "expected"),
    [
        ("a", "a", True),
        ("a", "b", False),
        ("a", None, False),
        ("!a", "a", False),
        ("!a", "b", True),
        ("!a", None, True),
        ("in(a, b)", "b", True),
        ("in(a,b)", "c", False),
        ("!in(a, b)", "b", False),
        ("!in(a, b)", "c", True),
    ],
)
def test_selectors_pass_the_labels_that_ray_lets_pass(selector: str, value: str | None, expected: bool) -> None:
    assert passes(selector, value) is expected


def test_selectors_are_those_that_ray_takes() -> None:
    from ray._private.label_utils import validate_label_selector

    from graft.domain.placement import is_selector

    for text in ("a", "!a", "in(a)", "in(a, b)", "!in(a,b)", "a.b-c_d", "in()", "in(a", "!!a", "-a", "a b", "a" * 64):
        assert is_selector(text) is (validate_label_selector({"label": text}) is None), text


def test_a_node_holds_as_many_as_its_scarcest_resource_and_none_where_a_label_forbids_it() -> None:
    half = Demand({"CPU": 1.0, "GPU": 0.5})
    assert count([SMALL, LARGE], half) == 4
    assert count([SMALL, LARGE], Demand({"CPU": 1.0}, {"pool": "small"})) == 2
    assert count([SMALL, LARGE], Demand({"CPU": 3.0})) == 1
    assert count([SMALL, LARGE], Demand({"CPU": 0.1})) == 60
    assert total([SMALL, LARGE], Demand({"CPU": 1.0, "GPU": 0.5}, {"zone": "!a"})) == {"CPU": 2.0, "GPU": 0.0}
    assert str(Demand({"CPU": 1.0, "GPU": 0.5}, {"pool": "large"})) == "1 CPU and 0.5 GPU on nodes with pool=large"


def test_workers_without_a_gpu_leave_nodes_with_gpus_to_those_that_need_them() -> None:
    free = left([LARGE, SMALL], [Claim(2, Demand({"CPU": 1.0}))])
    assert count(free, Demand({"CPU": 4.0, "GPU": 1.0})) == 1
    # The choosiest first, in whatever order they are named.
    free = left([LARGE, SMALL], [Claim(4, Demand({"CPU": 1.0})), Claim(2, Demand({"CPU": 1.0, "GPU": 1.0}))])
    assert [node.resources for node in free] == [{"CPU": 0.0, "GPU": 0.0}, {"CPU": 0.0}]


def test_what_fits_nowhere_takes_nothing() -> None:
    assert left([SMALL], [Claim(1, Demand({"CPU": 1.0, "GPU": 1.0})), Claim(3, Demand({}))]) == [SMALL]


def test_a_base_models_pool_overrides_the_default_field_by_field(tmp_path: Path) -> None:
    read = loaded(
        tmp_path,
        """
training:
  worker: {cpus: 2, gpus: 0, label_selector: {pool: training}}
  pools:
    large: {gpus: 0.5}
serving:
  num_replicas: 2
  replica: {cpus: 1, resources: {fast_disk: 1}}
  pools:
    large: {gpus: 1, label_selector: {pool: "in(a, b)"}}
    copied: {num_replicas: 3}
""",
    )
    assert read.training.demand("small") == Demand({"CPU": 2.0, "GPU": 0.0}, {"pool": "training"})
    assert read.training.demand("large") == Demand({"CPU": 2.0, "GPU": 0.5}, {"pool": "training"})
    assert read.serving.pool("small").demand == Demand({"CPU": 1.0, "fast_disk": 1.0})
    assert read.serving.pool("large").demand == Demand({"CPU": 1.0, "GPU": 1.0, "fast_disk": 1.0}, {"pool": "in(a, b)"})
    assert [read.serving.pool(base).num_replicas for base in ("small", "large", "copied")] == [2, 2, 3]


def test_nothing_declared_is_a_cpu_a_worker_and_replicas_that_share_the_cores(tmp_path: Path) -> None:
    read = loaded(tmp_path)
    assert read.training.demand("any") == Demand({"CPU": 1.0})
    assert read.serving.pool("any").demand == Demand()
    assert reserved(read) == []
    assert read.training.largest == []


def test_the_stacks_own_inference_keeps_what_its_pools_declare_and_one_elsewhere_nothing(tmp_path: Path) -> None:
    text = "serving: {base_model: small, num_replicas: 2, replica: {cpus: 1}, pools: {large: {gpus: 1}}}"
    claims = reserved(loaded(tmp_path, text))
    assert claims == [Claim(2, Demand({"CPU": 1.0, "GPU": 1.0})), Claim(2, Demand({"CPU": 1.0}))]
    assert reserved(loaded(tmp_path, text, GRAFT_SERVING_ADDRESS="elsewhere:9000")) == []


def test_a_variable_holds_a_section_as_yaml(tmp_path: Path) -> None:
    read = loaded(tmp_path, GRAFT_TRAINING_SHARE="{CPU: 6}", GRAFT_TRAINING_POOLS="{large: {cpus: 4}}")
    assert read.training.share == {"CPU": 6.0}
    assert read.training.demand("large").resources["CPU"] == 4


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("GRAFT_TRAINING_WORKER", "{gpu: 1}", "training.worker.gpu: Extra inputs are not permitted"),
        ("GRAFT_TRAINING_WORKER", "{gpus: 2}", "training.worker.gpus: Input should be less than or equal to 1"),
        ("GRAFT_TRAINING_WORKER", "{cpus: 0}", "training.worker.cpus: Input should be greater than 0"),
        ("GRAFT_TRAINING_WORKER", "{resources: {GPU: 1}}", "GPU is set by cpus and gpus"),
        ("GRAFT_TRAINING_WORKER", "{", "training.worker: Value error, is not YAML: {"),
        ("GRAFT_TRAINING_SHARE", "{CPU: -1}", "training.share.CPU"),
        ("GRAFT_TRAINING_WORKER_GROUPS", "{gpu: {cpus: 4}}", "training.worker_groups.gpu.max_nodes: Field required"),
        ("GRAFT_SERVING_POOLS", "{large: {replicas: 1}}", "serving.pools.large.replicas"),
        (
            "GRAFT_SERVING_REPLICA",
            "{label_selector: {pool: 'in('}}",
            "serving.replica.label_selector.pool: Value error, 'in(' is no selector of a label: write value, !value",
        ),
    ],
)
def test_a_wrong_placement_is_refused_with_its_name(tmp_path: Path, variable: str, value: str, told: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        loaded(tmp_path, **{variable: value})
    assert told in caught.value.message
