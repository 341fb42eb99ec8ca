"""The chart over random values that its schema allows: it renders, and what it renders holds together."""

import copy
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.chart import Object, helm_path, of_kind, pods, render
from tests.support.kubernetes_schemas import VERSIONS, kubernetes_faults

pytestmark = pytest.mark.integration

NAMES = st.one_of(
    st.sampled_from(["on", "yes", "true", "null"]),  # words that YAML would take for something else
    st.from_regex(r"[a-z]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True),
)
FLAGS = st.booleans()
BYTES = st.sampled_from(["512Mi", "1.5Gi", "10G"])
RESOURCES = st.fixed_dictionaries(
    {"requests": st.fixed_dictionaries({"cpu": st.sampled_from(["250m", "1", 2]), "memory": BYTES})},
    optional={"limits": st.fixed_dictionaries({"memory": BYTES})},
)
TEXTS = st.dictionaries(NAMES, NAMES, max_size=2)
VARIABLES = st.lists(st.fixed_dictionaries({"name": NAMES, "value": NAMES}), max_size=2)
PLACEMENT: dict[str, st.SearchStrategy[Any]] = {
    "nodeSelector": TEXTS,
    "tolerations": st.lists(st.fixed_dictionaries({"key": NAMES, "operator": st.just("Exists")}), max_size=2),
    "resources": RESOURCES,
    "priorityClassName": NAMES,
    "podAnnotations": TEXTS,
    "env": VARIABLES,
}
PODS = st.fixed_dictionaries({}, optional={"labels": TEXTS, "annotations": TEXTS, "env": VARIABLES})
PEERS = st.lists(
    st.fixed_dictionaries({"namespaceSelector": st.fixed_dictionaries({"matchLabels": st.dictionaries(NAMES, NAMES)})}),
    max_size=2,
)
ASKED = st.fixed_dictionaries(
    {},
    optional={
        # What every node has room for: test_chart_placement.py asks for more.
        "cpus": st.just(0.1),
        "gpus": st.just(0),
        "labelSelector": st.dictionaries(NAMES, st.sampled_from(["!9", "!in(8, 9)"]), max_size=2),
    },
)
GROUPS = st.dictionaries(
    NAMES,
    st.fixed_dictionaries(
        {
            "enabled": FLAGS,
            "minReplicas": st.integers(0, 2),
            "maxReplicas": st.integers(2, 9),
            "gpus": st.integers(0, 8),
            "gpuResource": st.sampled_from(["nvidia.com/gpu", "amd.com/gpu"]),
            "labels": st.dictionaries(NAMES, NAMES, max_size=2),
            "resources": RESOURCES,
        }
    ),
    max_size=2,
)
STORAGE = st.one_of(
    st.fixed_dictionaries(
        {"kind": st.just("pvc")},
        optional={
            "pvc": st.fixed_dictionaries({}, optional={"existingClaim": NAMES, "storageClass": NAMES, "keep": FLAGS})
        },
    ),
    st.fixed_dictionaries(
        {
            "kind": st.just("s3"),
            "s3": st.fixed_dictionaries(
                {"url": st.sampled_from(["s3://bucket", "s3://bucket/a/b"])},
                optional={"endpointUrl": st.just("http://minio:9000"), "existingSecret": NAMES, "region": NAMES},
            ),
        }
    ),
)
VALUES = st.fixed_dictionaries(
    {"baseModel": st.just("smollm2-135m")},
    optional={
        "fullnameOverride": NAMES,
        "pods": PODS,
        "gateway": st.fixed_dictionaries(
            {},
            optional={
                **PLACEMENT,
                "replicas": st.integers(1, 5),
                "tlsSecret": NAMES,
                "existingApiKeySecret": NAMES,
                "autoscaling": st.fixed_dictionaries({"enabled": FLAGS, "maxReplicas": st.integers(2, 30)}),
                "podDisruptionBudget": st.fixed_dictionaries({"enabled": FLAGS}),
            },
        ),
        "orchestrator": st.fixed_dictionaries({}, optional={**PLACEMENT, "replicas": st.integers(1, 3)}),
        "ray": st.fixed_dictionaries({}, optional={"existingTokenSecret": NAMES}),
        "training": st.fixed_dictionaries(
            {"workerGroups": GROUPS}, optional={"worker": ASKED, "pools": st.dictionaries(NAMES, ASKED, max_size=2)}
        ),
        "inference": st.fixed_dictionaries(
            {},
            optional={
                "replicas": st.integers(1, 8),
                "replica": ASKED,
                "pools": st.dictionaries(NAMES, ASKED, max_size=2),
                "maxLoraRank": st.sampled_from([8, 64, 512]),
                "workers": st.fixed_dictionaries({}, optional={**PLACEMENT, "gpus": st.sampled_from([0, 8])}),
            },
        ),
        "mlflow": st.fixed_dictionaries({}, optional={"auth": st.fixed_dictionaries({"enabled": FLAGS})}),
        "database": st.fixed_dictionaries({"existingSecret": NAMES}),
        "storage": STORAGE,
        "networkPolicy": st.fixed_dictionaries({"enabled": FLAGS, "clients": PEERS, "mlflowClients": PEERS}),
        "ingress": st.fixed_dictionaries(
            {"http": st.fixed_dictionaries({"enabled": FLAGS}, optional={"tlsSecret": NAMES})}
        ),
        "monitoring": st.fixed_dictionaries({"enabled": FLAGS}),
        "test": st.fixed_dictionaries({"enabled": FLAGS}),
    },
)


@pytest.mark.timeout(600)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(VALUES)
def test_whatever_the_schema_allows_renders_and_holds_together(values: Object) -> None:
    objects = render(helm_path("helm4"), copy.deepcopy(values))
    assert [fault for one in objects for fault in kubernetes_faults(one, VERSIONS[-1])] == []
    names = [(one["kind"], one["metadata"]["name"]) for one in objects]
    assert len(names) == len(set(names))
    made = {
        kind: set(of_kind(objects, kind)) for kind in ("ConfigMap", "Secret", "PersistentVolumeClaim", "ServiceAccount")
    }
    given_names = str(values)
    for pod in pods(objects):
        for volume in pod.spec["volumes"]:
            if "configMap" in volume:
                assert volume["configMap"]["name"] in made["ConfigMap"]
            for kind, reference in (
                ("Secret", volume.get("secret", {}).get("secretName")),
                ("PersistentVolumeClaim", volume.get("persistentVolumeClaim", {}).get("claimName")),
            ):
                assert reference is None or reference in made[kind] or reference in given_names
        for container in pod.containers:
            for variable in container.get("env", []):
                reference = variable.get("valueFrom", {}).get("secretKeyRef", {}).get("name")
                assert reference is None or reference in made["Secret"] or reference in given_names
        assert pod.spec["serviceAccountName"] in {*made["ServiceAccount"], "default"}
    if values.get("networkPolicy", {}).get("enabled", True):
        covered = {
            one["spec"]["podSelector"]["matchLabels"].get("app.kubernetes.io/component")
            for one in of_kind(objects, "NetworkPolicy").values()
        }
        assert {pod.component for pod in pods(objects)} <= covered
