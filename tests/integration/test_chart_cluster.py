"""The chart on a real API server, by both Helms: install, upgrades, rollback, uninstall, rights, admission.

`make test-k8s` starts the control plane and this in it.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.chart import CHART, EXAMPLES, LAPTOP, helm, helm_path
from tests.support.control_plane import (
    a_namespace,
    await_names,
    helm_does,
    items,
    kubectl,
    names,
    needs_control_plane,
    probes,
)

__all__ = ["helm"]

pytestmark = [pytest.mark.integration, needs_control_plane]
NAMESPACE = "graft-test"
WAIT = ("--wait", "--timeout", "120s")
CLIENT_SIDE = {"helm3": (), "helm4": ("--server-side=false",)}
"""With Helm 4's default Ray's autoscaler would own the list of groups: said once, it holds for the release."""


@pytest.fixture(scope="module", autouse=True)
def answers() -> Iterator[None]:
    """Something answers where the kubelet asks."""
    with probes():
        yield


@pytest.fixture
def namespace() -> Iterator[list[str]]:
    """An empty namespace with volumes to claim; the names of the Jobs that ran in it."""
    with a_namespace(NAMESPACE) as completed:
        yield completed


def held(secret: str) -> Any:
    return json.loads(kubectl("-n", NAMESPACE, "get", "secret", secret, "-o", "json"))["data"]


def scale_as_rays_autoscaler(replicas: int) -> None:
    """By the patch that it sends."""
    patch = json.dumps([{"op": "replace", "path": "/spec/workerGroupSpecs/0/replicas", "value": replicas}])
    manager = "--field-manager=python-requests"
    kubectl("-n", NAMESPACE, "patch", "raycluster", "graft-training", "--type=json", "-p", patch, manager)


def training_nodes() -> int:
    (cluster,) = items(NAMESPACE, "raycluster")
    (group,) = cluster["spec"]["workerGroupSpecs"]
    return int(group["replicas"])


def available(deployment: str) -> int:
    told = json.loads(kubectl("-n", NAMESPACE, "get", "deployment", deployment, "-o", "json"))
    return int(told["status"].get("availableReplicas", 0))


@pytest.mark.timeout(900)
def test_a_release_is_installed_upgraded_rolled_back_and_leaves_nothing(helm: Path, namespace: list[str]) -> None:
    before = names(NAMESPACE)
    # The simulated node has one CPU, which two gateways as they come would not leave enough of.
    values = ("--values", str(LAPTOP), "--set", "gateway.resources.requests.cpu=50m")
    told = helm_does(helm, NAMESPACE, "install", "graft", str(CHART), *values, *CLIENT_SIDE[helm.name], *WAIT)
    assert "for trials only" in told.stdout
    assert namespace == []  # a trial's database is made by the install, so that nothing is migrated before it
    assert available("graft-gateway") == available("graft-orchestrator") == available("graft-mlflow") == 1
    secrets = {
        name: held(name)
        for name in ("graft-api-key", "graft-ray-token", "graft-engine-token", "graft-mlflow", "graft-database")
    }

    scale_as_rays_autoscaler(3)
    # This Kubernetes has no autoscaling/v2: there are as many gateways as without it.
    more = ("--set", "orchestrator.replicas=2,gateway.replicas=2,gateway.autoscaling.enabled=true")
    helm_does(helm, NAMESPACE, "upgrade", "graft", str(CHART), *values, *more, *WAIT)
    assert namespace == ["graft-migrate"]
    assert available("graft-orchestrator") == available("graft-gateway") == 2
    assert training_nodes() == 3  # a job goes on, on the nodes that it has
    assert {name: held(name) for name in secrets} == secrets

    # What cannot be scheduled: the gateway that answers stays.
    too_much = ("--set", "gateway.resources.requests.cpu=1000")
    failed = helm_does(
        helm, NAMESPACE, "upgrade", "graft", str(CHART), *values, *too_much, "--wait", "--timeout", "20s", check=False
    )
    assert failed.returncode != 0
    assert available("graft-gateway") >= 1

    scale_as_rays_autoscaler(2)
    helm_does(helm, NAMESPACE, "rollback", "graft", "1", *WAIT)
    assert training_nodes() == 2
    assert available("graft-gateway") == available("graft-orchestrator") == 1
    assert {name: held(name) for name in secrets} == secrets

    helm_does(helm, NAMESPACE, "uninstall", "graft", *WAIT)
    assert await_names(NAMESPACE, before) == set()


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("namespace")
def test_the_autoscaler_may_patch_its_cluster_and_nobody_may_read_secrets() -> None:
    helm_does(helm_path("helm4"), NAMESPACE, "install", "graft", str(CHART), "--values", str(LAPTOP))

    def may(account: str, verb: str, resource: str) -> bool:
        user = f"--as=system:serviceaccount:{NAMESPACE}:{account}"
        return kubectl("-n", NAMESPACE, "auth", "can-i", verb, resource, user, check=False).strip() == "yes"

    assert may("graft-autoscaler", "patch", "rayclusters.ray.io/graft-training")
    assert may("graft-autoscaler", "list", "pods")
    assert not may("graft-autoscaler", "patch", "rayclusters.ray.io/another")
    for account in ("graft", "graft-autoscaler"):
        for verb, resource in (
            ("get", "secrets"),
            ("list", "secrets"),
            ("create", "pods"),
            ("delete", "pods"),
            ("create", "pods/exec"),
            ("delete", "rayclusters.ray.io/graft-training"),
        ):
            assert not may(account, verb, resource), f"{account} {verb} {resource}"
    assert not may("graft", "list", "pods")
    helm_does(helm_path("helm4"), NAMESPACE, "uninstall", "graft")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("values", EXAMPLES, ids=lambda file: file.stem)
def test_the_api_server_admits_every_object_of_every_example(helm: Path, values: Path, namespace: list[str]) -> None:
    # Gateway API is not installed here, and its definitions are in no package.
    without = ("--set", "gatewayApi.httpRoute.enabled=false", "--set", "gatewayApi.grpcRoute.enabled=false")
    rendered = ("template", "graft", str(CHART), "--values", str(values), "--validate", *without)
    told = helm_does(helm, NAMESPACE, *rendered)
    objects = [one for one in yaml.safe_load_all(told.stdout) if one]
    accounts = [one for one in objects if one["kind"] == "ServiceAccount"]  # without them no pod is admitted
    others = [one for one in objects if one["kind"] != "ServiceAccount"]
    kubectl("-n", NAMESPACE, "create", "-f", "-", stdin=yaml.safe_dump_all(accounts))
    kubectl("-n", NAMESPACE, "create", "--dry-run=server", "-f", "-", stdin=yaml.safe_dump_all(others))
    assert namespace == []


@pytest.mark.timeout(300)
def test_without_kuberay_the_install_is_refused_before_anything_is_made(helm: Path, namespace: list[str]) -> None:
    before = names(NAMESPACE)
    definitions = kubectl("get", "crd", "-o", "json")
    kubectl("delete", "crd", "--all", "--wait")
    try:
        deadline = time.monotonic() + 60
        while "ray.io" in kubectl("api-versions") and time.monotonic() < deadline:
            time.sleep(1)
        told = helm_does(helm, NAMESPACE, "install", "graft", str(CHART), "--values", str(LAPTOP), check=False)
        assert told.returncode != 0
        assert "KubeRay's operator is not installed" in told.stderr
        assert names(NAMESPACE, "all,cm,secret,sa") <= before
    finally:
        _create_definitions(definitions)
    assert namespace == []


def _create_definitions(told: str) -> None:
    """Those that kubectl has told of."""
    fresh = json.loads(told)
    for one in fresh["items"]:
        one["metadata"] = {key: one["metadata"][key] for key in ("name", "annotations") if key in one["metadata"]}
        one.pop("status", None)
    kubectl("create", "-f", "-", stdin=json.dumps(fresh))
    kubectl("wait", "--for=condition=established", "--timeout=60s", "crd", "--all")
    deadline = time.monotonic() + 60
    while "ray.io/v1\n" not in kubectl("api-versions") and time.monotonic() < deadline:
        time.sleep(1)


@pytest.mark.timeout(300)
def test_definitions_that_would_drop_rays_token_are_refused(helm: Path, namespace: list[str]) -> None:
    held = json.loads(kubectl("get", "crd", "rayclusters.ray.io", "-o", "json"))
    (place,) = [number for number, one in enumerate(held["spec"]["versions"]) if one["name"] == "v1"]
    path = f"/spec/versions/{place}/schema/openAPIV3Schema/properties/spec/properties/authOptions"
    known = held["spec"]["versions"][place]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
    patch = [{"op": "remove", "path": f"{path}/properties/secretName"}]
    kubectl("patch", "crd", "rayclusters.ray.io", "--type=json", "-p", json.dumps(patch))
    try:
        told = helm_does(helm, NAMESPACE, "install", "graft", str(CHART), "--values", str(LAPTOP), check=False)
        assert told.returncode != 0
        assert "KubeRay's definitions are older than 1.6" in told.stderr
    finally:
        patch = [{"op": "replace", "path": path, "value": known["authOptions"]}]
        kubectl("patch", "crd", "rayclusters.ray.io", "--type=json", "-p", json.dumps(patch))
    assert namespace == []
