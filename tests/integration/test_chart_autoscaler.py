"""Ray's autoscaler, as it runs beside the training head, on a real API server with the chart's account and cluster.

`make test-k8s` starts the control plane and this in it. The test plays KubeRay's operator: a worker that the RayCluster
is patched to have becomes a pod and a real Ray node, and a worker that is to go goes. Head and autoscaler are real.
"""

import base64
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support.chart import CHART, Object, helm_path

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(400),
    pytest.mark.skipif(
        "GRAFT_TEST_CLUSTER" not in os.environ, reason="There is no cluster to test on: run `make test-k8s`."
    ),
]
NAMESPACE = "graft-grows"
CLUSTER = "graft-training"
POOLS = """
baseModel: smollm2-135m
training:
  idleTimeoutSeconds: 5
  workerGroups:
    cpu: {minReplicas: 0, maxReplicas: 2}
    large:
      enabled: true
      minReplicas: 0
      maxReplicas: 1
      gpus: 0
      labels: {pool: large}
      resources: {requests: {cpu: "2", memory: 1Gi}, limits: {cpu: "2", memory: 1Gi}}
"""
RESERVE = """
import sys, time, ray
from ray.util.placement_group import placement_group
ray.init("auto", log_to_driver=False)
asked = placement_group([{"CPU": 2}], bundle_label_selector=[{"pool": "large"}])
ray.get(asked.ready(), timeout=180)
"""
"""What a job of Graft reserves for a worker with a `labelSelector`; given back when the driver ends."""
AS_POD = """
mount -t tmpfs none /run && mkdir -p /run/secrets/kubernetes.io/serviceaccount &&
cp "$1" /run/secrets/kubernetes.io/serviceaccount/token && cp "$2" /run/secrets/kubernetes.io/serviceaccount/ca.crt &&
shift 2 && exec "$@"
"""
"""The account's credentials where a pod has them."""


def kubectl(*arguments: str, stdin: str | None = None) -> str:
    told = subprocess.run(["kubectl", "-n", NAMESPACE, *arguments], input=stdin, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    return told.stdout


def group(name: str) -> Object:
    """A worker group of the RayCluster, as the API server has it now."""
    (found,) = [
        one
        for one in json.loads(kubectl("get", "raycluster", CLUSTER, "-o", "json"))["spec"]["workerGroupSpecs"]
        if one["groupName"] == name
    ]
    return found  # type: ignore[no-any-return]


def ray_pod(name: str, kind: str, group_name: str) -> None:
    """A pod by which the autoscaler knows a node; it runs nothing."""
    labels = {"ray.io/cluster": CLUSTER, "ray.io/node-type": kind, "ray.io/group": group_name}
    spec = {"containers": [{"name": "ray", "image": "none"}]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels}, "spec": spec}
    kubectl("create", "-f", "-", stdin=json.dumps(pod))
    kubectl("wait", "--for=condition=Ready", f"pod/{name}", "--timeout=60s")


def until(passed: Callable[[], bool], what: str, logs: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not passed():
        ends = "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in sorted(logs.glob("*.log")))
        assert time.monotonic() < deadline, f"{what}\n{ends}"
        time.sleep(1)


@contextmanager
def running(command: list[str], log: Path, **variables: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A process until the block ends, and all that it started."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env={**os.environ, **variables}, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(60)


@pytest.fixture
def installed(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The chart with two groups at zero; the variables of its Ray."""
    values = tmp_path / "values.yaml"
    values.write_text(POOLS)
    helm = helm_path("helm4")
    established = ["kubectl", "wait", "--for=condition=established", "--timeout=60s", "crd", "--all"]
    subprocess.run(established, check=True, capture_output=True)
    subprocess.run(["kubectl", "create", "namespace", NAMESPACE], check=True, capture_output=True)
    subprocess.run([helm, "install", "graft", CHART, "-n", NAMESPACE, "--values", values], check=True)
    secret = json.loads(kubectl("get", "secret", "graft-ray-token", "-o", "json"))["data"]["auth_token"]
    yield {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": base64.b64decode(secret).decode(),
        "RAY_enable_autoscaler_v2": "true",
        "RAY_CLUSTER_NAME": CLUSTER,
        "RAY_CLUSTER_NAMESPACE": NAMESPACE,
        "RAY_HEAD_POD_NAME": "head",
        "KUBERNETES_SERVICE_HOST": "127.0.0.1",
        "KUBERNETES_SERVICE_PORT_HTTPS": "16443",
        "KUBERAY_CRD_VER": "v1",
    }
    subprocess.run([helm, "uninstall", "graft", "-n", NAMESPACE, "--wait"], check=True)
    subprocess.run(["kubectl", "delete", "namespace", NAMESPACE, "--wait"], check=True, capture_output=True)


def credentials(folder: Path) -> list[str]:
    """Files with the autoscaler's token, and with the certificate that the API server signed for itself."""
    account = json.loads(kubectl("get", "serviceaccount", "graft-autoscaler", "-o", "json"))
    token = json.loads(kubectl("get", "secret", account["secrets"][0]["name"], "-o", "json"))["data"]["token"]
    (folder / "token").write_bytes(base64.b64decode(token))
    certificate = Path(os.environ["KUBECONFIG"]).parent / "certs" / "apiserver.crt"
    return [str(folder / "token"), str(certificate)]


@pytest.fixture
def ray_folder() -> Iterator[str]:
    """A short one: Ray's sockets end at 107 characters."""
    with tempfile.TemporaryDirectory(prefix="gk", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield folder


def test_the_group_of_the_asked_labels_grows_from_zero_for_a_job_and_goes_back(
    installed: dict[str, str], ray_folder: str, tmp_path: Path
) -> None:
    ray = str(Path(sys.executable).with_name("ray"))

    def node(*options: str) -> list[str]:
        return [ray, "start", "--block", "--disable-usage-stats", *options]

    def healthy() -> bool:
        asked = [ray, "health-check", "--address", "127.0.0.1:6379"]
        return subprocess.run(asked, env={**os.environ, **installed}, capture_output=True).returncode == 0

    def pod(name: str, group_name: str) -> dict[str, str]:
        return {**installed, "RAY_CLOUD_INSTANCE_ID": name, "RAY_NODE_TYPE_NAME": group_name}

    def to_go() -> object:
        return group("large").get("scaleStrategy", {}).get("workersToDelete")

    with ExitStack() as processes:

        def start(name: str, command: list[str], variables: dict[str, str]) -> "subprocess.Popen[bytes]":
            return processes.enter_context(running(command, tmp_path / f"{name}.log", **variables))

        ray_pod("head", "head", "headgroup")
        head = node("--head", "--num-cpus=0", "--port=6379", "--no-monitor", f"--temp-dir={ray_folder}")
        start("head", head, pod("head", "headgroup"))
        until(healthy, "Ray's head does not answer", tmp_path)
        as_pod = ["unshare", "--mount", "sh", "-c", AS_POD, "sh", *credentials(tmp_path)]
        autoscaler = [ray, "kuberay-autoscaler", "--cluster-name", CLUSTER, "--cluster-namespace", NAMESPACE]
        start("autoscaler", [*as_pod, *autoscaler], installed)
        job = start("job", [sys.executable, "-c", RESERVE], {**installed, "RAY_ADDRESS": "127.0.0.1:6379"})
        until(lambda: group("large")["replicas"] == 1, "The RayCluster was not patched to have a worker", tmp_path)
        assert group("cpu")["replicas"] == 0  # has room, and not the label

        ray_pod("worker", "worker", "large")
        labels = ",".join(f"{key}={value}" for key, value in group("large")["labels"].items())
        worker = node("--address=127.0.0.1:6379", "--num-cpus=2", f"--labels={labels}")
        ended = start("worker", worker, pod("worker", "large"))
        assert job.wait(180) == 0, (tmp_path / "job.log").read_text()
        until(lambda: to_go() == ["worker"], "The idle worker was not told to go", tmp_path)
        assert group("large")["replicas"] == 0
        ended.terminate()
        kubectl("delete", "pod", "worker", "--wait", "--grace-period=0", "--force")
        until(lambda: "->TERMINATED " in (tmp_path / "autoscaler.log").read_text(), "It has not seen it go", tmp_path)
        assert group("cpu")["replicas"] == group("large")["replicas"] == 0
