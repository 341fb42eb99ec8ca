"""The chart on a real API server, by both Helms: install, upgrades, rollback, uninstall, rights, admission.

`make test-k8s` starts the control plane and this in it. Pods there run nothing and all have one address: what stands in
for them here answers their probes and completes the Jobs of hooks, and nothing else.
"""

import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.chart import CHART, EXAMPLES, LAPTOP, Object, helm, helm_path

__all__ = ["helm"]

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(
        "GRAFT_TEST_CLUSTER" not in os.environ, reason="There is no cluster to test on: run `make test-k8s`."
    ),
]
NAMESPACE = "graft-test"
POD_ADDRESS = "192.168.192.168"
PROBED_PORTS = (5000, 8080)
KINDS = "all,pvc,cm,secret,sa,role,rolebinding,networkpolicy,ingress,raycluster,rayservice"
WAIT = ("--wait", "--timeout", "120s")
CLIENT_SIDE = {"helm3": (), "helm4": ("--server-side=false",)}
"""With Helm 4's default Ray's autoscaler would own the list of groups: said once, it holds for the release."""


def kubectl(*arguments: str, stdin: str | None = None, check: bool = True) -> str:
    """What kubectl prints."""
    told = subprocess.run(["kubectl", *arguments], input=stdin, capture_output=True, text=True)
    assert told.returncode == 0 or not check, told.stderr
    return told.stdout


def items(kind: str, *options: str) -> list[Object]:
    found: list[Object] = json.loads(kubectl("-n", NAMESPACE, "get", kind, "-o", "json", *options))["items"]
    return found


def complete_jobs(stop: threading.Event, completed: list[str]) -> None:
    """Says of every Job that it has succeeded, which its pods never will."""
    done = {"conditions": [{"type": "Complete", "status": "True"}], "succeeded": 1}
    while not stop.wait(1):
        for job in json.loads(kubectl("-n", NAMESPACE, "get", "jobs", "-o", "json", check=False) or '{"items": []}')[
            "items"
        ]:
            name = job["metadata"]["name"]
            if not job.get("status", {}).get("succeeded"):
                patch = json.dumps({"status": done})
                kubectl(
                    *("-n", NAMESPACE, "patch", "job", name, "--subresource=status", "--type=merge", "-p", patch),
                    check=False,
                )
                completed.append(name)


class Well(BaseHTTPRequestHandler):
    """Answers every probe."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Not a line a probe."""


@pytest.fixture(scope="module", autouse=True)
def probes() -> Iterator[None]:
    """Something answers where the kubelet asks."""
    servers = [ThreadingHTTPServer((POD_ADDRESS, port), Well) for port in PROBED_PORTS]
    threads = [threading.Thread(target=server.serve_forever) for server in servers]
    for thread in threads:
        thread.start()
    yield
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def namespace() -> Iterator[list[str]]:
    """An empty namespace with volumes to claim; the names of the Jobs that ran in it."""
    kubectl("wait", "--for=condition=established", "--timeout=60s", "crd", "--all")
    kubectl("create", "namespace", NAMESPACE)
    volumes = [
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": f"v{number}"},
            "spec": {
                "capacity": {"storage": "100Gi"},
                "accessModes": ["ReadWriteOnce", "ReadWriteMany"],
                "hostPath": {"path": f"/volumes/{number}"},
            },
        }
        for number in range(2)
    ]
    kubectl("create", "-f", "-", stdin=yaml.safe_dump_all(volumes))
    stop, completed = threading.Event(), list[str]()
    thread = threading.Thread(target=complete_jobs, args=(stop, completed))
    thread.start()
    yield completed
    stop.set()
    thread.join()
    kubectl("delete", "namespace", NAMESPACE, "--wait")
    kubectl("delete", "pv", "--all")


def helm_does(helm: Path, *arguments: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
    told = subprocess.run([helm, *arguments, "--namespace", NAMESPACE], capture_output=True, text=True)
    assert told.returncode == 0 or not check, told.stdout + told.stderr
    return told


def held(secret: str) -> Any:
    return json.loads(kubectl("-n", NAMESPACE, "get", "secret", secret, "-o", "json"))["data"]


def scale_as_rays_autoscaler(replicas: int) -> None:
    """By the patch that it sends."""
    patch = json.dumps([{"op": "replace", "path": "/spec/workerGroupSpecs/0/replicas", "value": replicas}])
    manager = "--field-manager=python-requests"
    kubectl("-n", NAMESPACE, "patch", "raycluster", "graft-training", "--type=json", "-p", patch, manager)


def training_nodes() -> int:
    (cluster,) = items("raycluster")
    (group,) = cluster["spec"]["workerGroupSpecs"]
    return int(group["replicas"])


def available(deployment: str) -> int:
    told = json.loads(kubectl("-n", NAMESPACE, "get", "deployment", deployment, "-o", "json"))
    return int(told["status"].get("availableReplicas", 0))


@pytest.mark.timeout(900)
def test_a_release_is_installed_upgraded_rolled_back_and_leaves_nothing(helm: Path, namespace: list[str]) -> None:
    before = {(one["kind"], one["metadata"]["name"]) for one in items(KINDS)}
    # The simulated node has one CPU, which two gateways as they come would not leave enough of.
    values = ("--values", str(LAPTOP), "--set", "gateway.resources.requests.cpu=50m")
    told = helm_does(helm, "install", "graft", str(CHART), *values, *CLIENT_SIDE[helm.name], *WAIT)
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
    helm_does(helm, "upgrade", "graft", str(CHART), *values, *more, *WAIT)
    assert namespace == ["graft-migrate"]
    assert available("graft-orchestrator") == available("graft-gateway") == 2
    assert training_nodes() == 3  # a job goes on, on the nodes that it has
    assert {name: held(name) for name in secrets} == secrets

    # What cannot be scheduled: the gateway that answers stays.
    too_much = ("--set", "gateway.resources.requests.cpu=1000")
    failed = helm_does(
        helm, "upgrade", "graft", str(CHART), *values, *too_much, "--wait", "--timeout", "20s", check=False
    )
    assert failed.returncode != 0
    assert available("graft-gateway") >= 1

    scale_as_rays_autoscaler(2)
    helm_does(helm, "rollback", "graft", "1", *WAIT)
    assert training_nodes() == 2
    assert available("graft-gateway") == available("graft-orchestrator") == 1
    assert {name: held(name) for name in secrets} == secrets

    helm_does(helm, "uninstall", "graft", *WAIT)
    deadline = time.monotonic() + 60
    while True:  # pods and endpoints go after what owned them
        left = {(one["kind"], one["metadata"]["name"]) for one in items(KINDS)} - before
        if not left or time.monotonic() > deadline:
            break
        time.sleep(1)
    assert left == set()


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("namespace")
def test_the_autoscaler_may_patch_its_cluster_and_nobody_may_read_secrets() -> None:
    helm_does(helm_path("helm4"), "install", "graft", str(CHART), "--values", str(LAPTOP))

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
    helm_does(helm_path("helm4"), "uninstall", "graft")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("values", EXAMPLES, ids=lambda file: file.stem)
def test_the_api_server_admits_every_object_of_every_example(helm: Path, values: Path, namespace: list[str]) -> None:
    # Gateway API is not installed here, and its definitions are in no package.
    without = ("--set", "gatewayApi.httpRoute.enabled=false", "--set", "gatewayApi.grpcRoute.enabled=false")
    told = helm_does(helm, "template", "graft", str(CHART), "--values", str(values), "--validate", *without)
    objects = [one for one in yaml.safe_load_all(told.stdout) if one]
    accounts = [one for one in objects if one["kind"] == "ServiceAccount"]  # without them no pod is admitted
    others = [one for one in objects if one["kind"] != "ServiceAccount"]
    kubectl("-n", NAMESPACE, "create", "-f", "-", stdin=yaml.safe_dump_all(accounts))
    kubectl("-n", NAMESPACE, "create", "--dry-run=server", "-f", "-", stdin=yaml.safe_dump_all(others))
    assert namespace == []


@pytest.mark.timeout(300)
def test_without_kuberay_the_install_is_refused_before_anything_is_made(helm: Path, namespace: list[str]) -> None:
    before = {one["metadata"]["name"] for one in items(KINDS)}
    definitions = kubectl("get", "crd", "-o", "json")
    kubectl("delete", "crd", "--all", "--wait")
    try:
        deadline = time.monotonic() + 60
        while "ray.io" in kubectl("api-versions") and time.monotonic() < deadline:
            time.sleep(1)
        told = helm_does(helm, "install", "graft", str(CHART), "--values", str(LAPTOP), check=False)
        assert told.returncode != 0
        assert "KubeRay's operator is not installed" in told.stderr
        assert {
            one["metadata"]["name"]
            for one in json.loads(kubectl("-n", NAMESPACE, "get", "all,cm,secret,sa", "-o", "json"))["items"]
        } <= before
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
        told = helm_does(helm, "install", "graft", str(CHART), "--values", str(LAPTOP), check=False)
        assert told.returncode != 0
        assert "KubeRay's definitions are older than 1.6" in told.stderr
    finally:
        patch = [{"op": "replace", "path": path, "value": known["authOptions"]}]
        kubectl("patch", "crd", "rayclusters.ray.io", "--type=json", "-p", json.dumps(patch))
    assert namespace == []
