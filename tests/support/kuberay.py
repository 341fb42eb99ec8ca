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
UNITS = {"m": 1e-3, "": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "k": 1e3, "M": 1e6, "G": 1e9}
ASK = """
import sys, urllib.request
method, url, token = sys.argv[1:4]
body = sys.stdin.buffer.read() if method == "PUT" else None
headers = {"Authorization": "Bearer " + token, "Content-Type": "application/json"}
print(urllib.request.urlopen(urllib.request.Request(url, body, headers, method=method), timeout=60).read().decode())
"""


def quantity(text: str) -> float:
    """A resource as Kubernetes writes it."""
    number = text.rstrip("mKMGki")
    return float(number) * UNITS[text[len(number) :]]


def pods(owner: Object) -> Iterator[Object]:
    """The templates of the head's pod, and of one pod of each group of workers that has any."""
    serves = owner["kind"] == "RayService"
    cluster = owner["spec"]["rayClusterConfig"] if serves else owner["spec"]
    name = owner["metadata"]["name"]
    yield _pod(name, "headgroup", cluster["headGroupSpec"], cluster, serves, head=True)
    for group in cluster["workerGroupSpecs"]:
        if group["replicas"]:
            yield _pod(name, group["groupName"], group, cluster, serves, head=False)


def _pod(name: str, group: str, asked: Object, cluster: Object, serves: bool, *, head: bool) -> Object:
    template: Object = copy.deepcopy(asked["template"])
    template["metadata"]["labels"]["ray.io/node-type"] = "head" if head else "worker"
    spec = template["spec"]
    container = spec["containers"][0]
    service = f"{name}-head-svc"
    parameters = {
        **asked["rayStartParams"],
        "metrics-export-port": METRICS_PORT,
        "dashboard-agent-listen-port": AGENT_PORT,
        **_resources(container.get("resources", {}), asked["rayStartParams"]),
    }
    grows = cluster.get("enableInTreeAutoscaling", False)
    if head and grows:
        parameters["no-monitor"] = "true"
    if not head:
        parameters["address"] = f"{service}:{GCS_PORT}"
    if labels := asked.get("labels"):
        parameters["labels"] = ",".join(f"{key}={value}" for key, value in labels.items())
    flags = [f"--{key}" if value == "true" else f"--{key}={value}" for key, value in sorted(parameters.items())]
    start = " ".join(["ray", "start", *(["--head"] if head else []), "--block", *flags])
    container["command"] = ["/bin/bash", "-c", "--"]
    container["args"] = [f"ulimit -n 65536; {start}"]
    container["env"] += _variables(name, group, cluster["authOptions"]["secretName"], service, serves, head=head)
    if head and grows:
        container["env"].append({"name": "RAY_enable_autoscaler_v2", "value": "true"})
    spec["volumes"].append({"name": "shared-mem", "emptyDir": {"medium": "Memory"}})
    container["volumeMounts"].append({"name": "shared-mem", "mountPath": "/dev/shm"})
    container["readinessProbe"] = _probe(serves and not head)
    return template


def _resources(resources: Object, given: Object) -> Object:
    """CPUs by limit, else by request; memory by limit."""
    limits, requests = resources.get("limits", {}), resources.get("requests", {})
    found: Object = {}
    if "num-cpus" not in given and (cpu := limits.get("cpu") or requests.get("cpu")):
        found["num-cpus"] = math.ceil(quantity(str(cpu)))
    if memory := limits.get("memory"):
        found["memory"] = int(quantity(str(memory)))
    return found


def _variables(name: str, group: str, secret: str, service: str, serves: bool, *, head: bool) -> list[Object]:
    where = "127.0.0.1" if head else service
    plain = {
        "RAY_AUTH_MODE": "token",
        "RAY_CLUSTER_NAME": name,
        "RAY_CLUSTER_NAMESPACE": "ns",
        "RAY_CLOUD_INSTANCE_ID": f"{name}-{group}",
        "RAY_NODE_TYPE_NAME": group,
        "RAY_PORT": str(GCS_PORT),
        "RAY_ADDRESS": f"{where}:{GCS_PORT}",
        "RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE": "1",
    }
    if not head:
        plain |= {"FQ_RAY_IP": service, "RAY_IP": service}
    if serves:
        plain |= {
            "RAY_timeout_ms_task_wait_for_death_info": "0",
            "RAY_gcs_server_request_timeout_seconds": "5",
            "RAY_SERVE_KV_TIMEOUT_S": "5",
        }
    token = {"name": "RAY_AUTH_TOKEN", "valueFrom": {"secretKeyRef": {"name": secret, "key": "auth_token"}}}
    return [{"name": key, "value": value} for key, value in plain.items()] + [token]


def _probe(serves: bool) -> Object:
    """Ray's own health; of a node that is to serve, its proxy's as well."""
    if not serves:
        return {"httpGet": {"path": "/api/healthz", "port": AGENT_PORT}}
    ask = "wget --tries 1 -T 10 -q -O- http://localhost:{}/{} | grep success"
    checks = (ask.format(AGENT_PORT, "api/local_raylet_healthz"), ask.format(8000, "-/healthz"))
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
