"""What KubeRay's operator makes of a RayCluster and a RayService, for `tests.support.pods`: the commands and variables
of their pods, as its version 1.7.0 writes them, and Serve's configuration handed to the head.

Plays the operator's part and is not it: no reconcile, no autoscaler beside the head.
"""

import copy
import json
import math
import sys
from collections.abc import Iterator

import yaml

from tests.support.chart import Object
from tests.support.hosts import Host

GCS_PORT, AGENT_PORT, DASHBOARD_PORT, METRICS_PORT = 6379, 52365, 8265, 8080
NAMESPACE = "ns"
FOR_SERVICES = {
    "RAY_timeout_ms_task_wait_for_death_info": "0",
    "RAY_gcs_server_request_timeout_seconds": "5",
    "RAY_SERVE_KV_TIMEOUT_S": "5",
}
UNITS = {"m": 1e-3, "": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "k": 1e3, "M": 1e6, "G": 1e9}
ASK = """
import sys, urllib.request
method, url, token = sys.argv[1:4]
body = sys.stdin.buffer.read() if method == "PUT" else None
headers = {"x-ray-authorization": "Bearer " + token, "Content-Type": "application/json"}
print(urllib.request.urlopen(urllib.request.Request(url, body, headers, method=method), timeout=60).read().decode())
"""


def quantity(text: str) -> float:
    """A resource as Kubernetes writes it."""
    number = text.rstrip("mKMGki")
    return float(number) * UNITS[text[len(number) :]]


def pods(owner: Object, cluster_name: str | None = None) -> Iterator[Object]:
    """The templates of the head's pod, and of one pod of each group of workers that has any. A RayService's cluster
    has a name that the operator makes up."""
    serves = owner["kind"] == "RayService"
    cluster = owner["spec"]["rayClusterConfig"] if serves else owner["spec"]
    name = cluster_name or owner["metadata"]["name"]
    space = owner["metadata"].get("namespace", NAMESPACE)
    whole = f"{name}-head-svc.{space}.svc.cluster.local"
    yield _pod(name, "headgroup", cluster["headGroupSpec"], cluster, whole, serves, head=True)
    for group in cluster["workerGroupSpecs"]:
        if group["replicas"]:
            yield _pod(name, group["groupName"], group, cluster, whole, serves, head=False)


def _pod(name: str, group: str, asked: Object, cluster: Object, service: str, serves: bool, *, head: bool) -> Object:
    template: Object = copy.deepcopy(asked["template"])
    kind = "head" if head else "worker"
    made = {"ray.io/is-ray-node": "yes", "app.kubernetes.io/name": "kuberay"}
    made |= {"app.kubernetes.io/created-by": "kuberay-operator", "ray.io/identifier": f"{name}-{kind}"}
    own = {"ray.io/cluster": name, "ray.io/node-type": kind, "ray.io/group": group}
    if serves:
        own["ray.io/serve"] = "false" if head else "true"
    labels = asked.get("labels", {})
    template["metadata"]["labels"] = {**made, **template["metadata"]["labels"], **labels, **own}
    spec = template["spec"]
    container = spec["containers"][0]
    grows = cluster.get("enableInTreeAutoscaling", False)
    parameters = {
        **({"no-monitor": "true"} if head and grows else {}),
        **({"labels": ",".join(f"{key}={value}" for key, value in sorted(labels.items()))} if labels else {}),
        **({"dashboard-host": "0.0.0.0"} if head else {"address": f"{service}:{GCS_PORT}"}),
        "metrics-export-port": str(METRICS_PORT),
        "block": "true",
        "dashboard-agent-listen-port": str(AGENT_PORT),
        **_resources(container.get("resources", {})),
        **asked["rayStartParams"],
    }
    flags = "".join(
        f" --{key} " if value == "true" else f" --{key}={value} " for key, value in sorted(parameters.items())
    )
    start = f"ray start --head {flags}" if head else f"ray start {flags}"
    container["command"] = ["/bin/bash", "-c", "--"]
    container["args"] = [f"ulimit -n ${{RAY_START_ULIMIT_OPEN_FILES:-65536}}; {start}"]
    if head and grows:
        container["env"].append({"name": "RAY_enable_autoscaler_v2", "value": "true"})
    if grows:
        spec["restartPolicy"] = "Never"
    container["env"] += _variables(cluster["authOptions"]["secretName"], service, start, serves, head=head)
    _empty_dir(spec, container, "shared-mem", "/dev/shm", {"medium": "Memory", **_size(container)})
    if head and grows:
        _empty_dir(spec, container, "ray-logs", "/tmp/ray", {})
    for first in spec.get("initContainers", []):
        first["env"] += [
            {"name": "FQ_RAY_IP", "value": service},
            {"name": "RAY_IP", "value": service.partition(".")[0]},
        ]
    container["livenessProbe"] = {"httpGet": {"path": "/api/healthz", "port": AGENT_PORT}}
    container["readinessProbe"] = _probe(serves and not head)
    return template


def _empty_dir(spec: Object, container: Object, name: str, path: str, volume: Object) -> None:
    spec["volumes"].append({"name": name, "emptyDir": volume})
    container["volumeMounts"].append({"name": name, "mountPath": path})


def _size(container: Object) -> Object:
    """Of its shared memory: as much as the container may have, else as it asks for."""
    resources = container.get("resources", {})
    memory = resources.get("limits", {}).get("memory") or resources.get("requests", {}).get("memory")
    return {"sizeLimit": memory} if memory else {}


def _resources(resources: Object) -> dict[str, str]:
    """CPUs by limit, else by request; memory and GPUs by limit."""
    limits, requests = resources.get("limits", {}), resources.get("requests", {})
    found = {}
    if cpu := limits.get("cpu") or requests.get("cpu"):
        found["num-cpus"] = str(math.ceil(quantity(str(cpu))))
    if memory := limits.get("memory"):
        found["memory"] = str(int(quantity(str(memory))))
    for key, count in limits.items():
        if key.endswith("gpu"):
            found["num-gpus"] = str(count)
    return found


def _variables(secret: str, service: str, start: str, serves: bool, *, head: bool) -> list[Object]:
    """In the order in which the operator adds them."""
    where = "127.0.0.1" if head else service

    def said(**plain: str) -> list[Object]:
        return [{"name": name, "value": value} for name, value in plain.items()]

    def of_pod(name: str, path: str) -> Object:
        return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}

    kind = "RayService" if serves else "RayCluster"
    return [
        *said(RAY_AUTH_MODE="token"),
        {"name": "RAY_AUTH_TOKEN", "valueFrom": {"secretKeyRef": {"name": secret, "key": "auth_token"}}},
        *([] if head else said(FQ_RAY_IP=service, RAY_IP=service.partition(".")[0])),
        of_pod("RAY_CLUSTER_NAME", "metadata.labels['ray.io/cluster']"),
        of_pod("RAY_CLUSTER_NAMESPACE", "metadata.namespace"),
        of_pod("RAY_CLOUD_INSTANCE_ID", "metadata.name"),
        of_pod("RAY_NODE_TYPE_NAME", "metadata.labels['ray.io/group']"),
        *said(KUBERAY_GEN_RAY_START_CMD=start, RAY_PORT=str(GCS_PORT)),
        *(said(**FOR_SERVICES) if serves else []),
        *said(RAY_ADDRESS=f"{where}:{GCS_PORT}", RAY_USAGE_STATS_KUBERAY_IN_USE="1"),
        *(said(RAY_USAGE_STATS_EXTRA_TAGS=f"kuberay_version=v1.7.0;kuberay_crd={kind}") if head else []),
        *said(RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE="1"),
    ]


def _probe(serves: bool) -> Object:
    """Ray's own health; of a node that is to serve, its proxy's as well."""
    if not serves:
        return {"httpGet": {"path": "/api/healthz", "port": AGENT_PORT}}
    ask = "wget --tries 1 -T {} -q -O- http://localhost:{}/{} | grep success"
    checks = (ask.format(2, AGENT_PORT, "api/local_raylet_healthz"), ask.format(10, 8000, "-/healthz"))
    return {"exec": {"command": ["bash", "-c", " && ".join(checks)]}}


def deploy(service: Object, head: Host, token: str) -> None:
    """Hands Serve's configuration to the head's dashboard."""
    _ask("PUT", head, token, json.dumps(yaml.safe_load(service["spec"]["serveConfigV2"])))


def applications(head: Host, token: str) -> dict[str, str]:
    """The state of each of Serve's applications by name, as RUNNING."""
    told = json.loads(_ask("GET", head, token))
    return {name: application["status"] for name, application in told["applications"].items()}


def _ask(method: str, head: Host, token: str, body: str = "") -> str:
    url = f"http://{head.address}:{DASHBOARD_PORT}/api/serve/applications/"
    return head.run([sys.executable, "-c", ASK, method, url, token], stdin=body)
