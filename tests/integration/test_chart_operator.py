"""KubeRay's own operator with the chart's clusters, on a real API server: what it makes, moves, makes anew and leaves.

`make test-k8s` starts the control plane and this in it, where $GRAFT_KUBERAY_OPERATOR names the operator's binary. Pods
run nothing: that Serve's applications run is what the test says of a cluster, as the head's dashboard.
"""

import base64
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import kuberay, kuberay_operator
from tests.support.chart import CHART, EXAMPLES, LAPTOP, Object, helm_path
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
from tests.support.kuberay_operator import Dashboards

BINARY = os.environ.get("GRAFT_KUBERAY_OPERATOR", "")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(600),
    needs_control_plane,
    pytest.mark.skipif(not BINARY, reason="There is no operator: set GRAFT_KUBERAY_OPERATOR to KubeRay's binary."),
]
NAMESPACE, EXAMPLE = "graft-operated", "graft-example"
TRAINING = "graft-training"
MORE_NODES = 3
"""Each simulated node has one CPU and 4 GB."""
SMALL = """
gateway: {resources: {requests: {cpu: 50m}}}
orchestrator: {resources: {requests: {cpu: 50m}}}
training: {workerGroups: {cpu: {maxReplicas: 3, resources: {requests: {cpu: 50m, memory: 500Mi}}}}}
inference: {drainSeconds: 1, workers: {resources: {requests: {cpu: 50m, memory: 500Mi}}}}
"""
ELSEWHERE = {"ray.io/worker-group-replica-index"}
"""A label that only the operator can tell."""


@pytest.fixture(scope="module")
def dashboards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboards]:
    """The operator at work, a namespace, and room for two clusters of inference."""
    folder = tmp_path_factory.mktemp("operator")
    with ExitStack() as stack:
        stack.enter_context(probes())
        for number in range(1, MORE_NODES + 1):
            stack.enter_context(kuberay_operator.node(f"node-{number}", 16450 + 2 * number, folder))
        dashboards = stack.enter_context(kuberay_operator.running(Path(BINARY), credentials, folder))
        # Inside of the operator's time: a RayService goes when the operator lets it.
        stack.enter_context(a_namespace(NAMESPACE))
        yield dashboards
        print((folder / "operator.log").read_text()[-20000:])


def credentials() -> str:
    """What a head asks for."""
    (secret,) = [one for one in items(NAMESPACE, "secret") if one["metadata"]["name"].endswith("-ray-token")]
    return "Bearer " + base64.b64decode(secret["data"]["auth_token"]).decode()


def until(found: Callable[[], Any], what: str, seconds: float = 240) -> Any:
    """What `found` returns once it is anything."""
    deadline = time.monotonic() + seconds
    while not (result := found()):
        told = (one for space in (NAMESPACE, EXAMPLE) for one in items(space, "events"))
        events = [f"{one.get('reason')}: {one.get('message')}" for one in told]
        assert time.monotonic() < deadline, "\n".join([what, *events[-30:]])
        time.sleep(0.5)
    return result


def pods_of(cluster: str, namespace: str = NAMESPACE) -> list[Object]:
    """Of a RayCluster, those that are not going, the head first."""
    found = items(namespace, "pods", "-l", f"ray.io/cluster={cluster}")
    here = [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]
    return sorted(here, key=lambda pod: str(pod["metadata"]["labels"]["ray.io/node-type"]))


def ready(cluster: str, count: int) -> list[Object]:
    """Its pods, when there are so many and each is ready."""
    found = pods_of(cluster)
    passed = [pod for pod in found if ("Ready", "True") in conditions(pod)]
    return found if len(passed) == len(found) == count else []


def ids(pods: list[Object]) -> set[str]:
    return {pod["metadata"]["uid"] for pod in pods}


def conditions(one: Object) -> set[tuple[str, str]]:
    return {(told["type"], told["status"]) for told in one.get("status", {}).get("conditions", [])}


def serving(which: str = "active") -> str:
    """The RayCluster that answers, or the `pending` one that is to, by name; nothing while there is none."""
    (service,) = items(NAMESPACE, "rayservice")
    return str(service.get("status", {}).get(f"{which}ServiceStatus", {}).get("rayClusterName", ""))


def take_over(dashboards: Dashboards) -> str:
    """Lets the applications of the pending cluster run; its name once it has inference's Service."""
    cluster = until(lambda: serving("pending"), "No cluster is to take inference over")
    until(lambda: cluster in dashboards.told, f"{cluster} is not told what to serve")
    assert cluster != serving()
    dashboards.runs.add(cluster)
    until(lambda: serving() == cluster and not serving("pending"), f"{cluster} does not take over")
    return str(cluster)


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Of the release, as Helm is told."""
    small = tmp_path_factory.mktemp("values") / "small.yaml"
    small.write_text(SMALL)
    return ("graft", str(CHART), "--values", str(LAPTOP), "--values", str(small))


@pytest.fixture(scope="module")
def release(dashboards: Dashboards, values: tuple[str, ...]) -> set[tuple[str, str]]:
    """The chart installed, both clusters at work; what was in the namespace before."""
    before = names(NAMESPACE)
    helm_does(helm_path("helm4"), NAMESPACE, "install", *values, "--server-side=false")
    assert until(lambda: ready(take_over_first(dashboards), 2), "Inference has not two pods that are ready")
    assert until(lambda: ready(TRAINING, 2), "Training has not two pods that are ready")
    return before


def take_over_first(dashboards: Dashboards) -> str:
    return serving() or take_over(dashboards)


def ray_objects(*arguments: str) -> list[Object]:
    """Accounts and Ray's objects, as Helm renders them."""
    told = helm_does(helm_path("helm4"), NAMESPACE, "template", *arguments, "--api-versions=ray.io/v1")
    kinds = ("ServiceAccount", "RayCluster", "RayService")
    return [one for one in yaml.safe_load_all(told.stdout) if one and one["kind"] in kinds]


def made(pod: Object) -> Object:
    """A pod as the operator made it: without what Kubernetes adds."""
    spec = pod["spec"]
    spec["tolerations"] = [
        one for one in spec["tolerations"] if not one.get("key", "").startswith("node.kubernetes.io/")
    ]
    token = f"{spec['serviceAccountName']}-token-"
    for holder, key in ((spec, "volumes"), *((container, "volumeMounts") for container in spec["containers"])):
        holder[key] = [one for one in holder[key] if not one["name"].startswith(token)]
    labels = pod["metadata"]["labels"]
    pod["metadata"]["labels"] = {key: value for key, value in labels.items() if key not in ELSEWHERE}
    return pod


def lacks(expected: object, found: object, where: str = "") -> list[str]:
    """What of the expected is not there or another; lists are to be as long, and a quantity may be a number."""
    if isinstance(expected, dict) and isinstance(found, dict):
        return [fault for key, value in expected.items() for fault in lacks(value, found.get(key), f"{where}/{key}")]
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        pairs = enumerate(zip(expected, found, strict=True))
        return [fault for number, (one, other) in pairs for fault in lacks(one, other, f"{where}/{number}")]
    return [] if str(expected) == str(found) else [f"{where}: {found}, not {expected}"]


@pytest.fixture
def namespace(dashboards: Dashboards) -> Iterator[str]:
    """An empty one that the operator works in."""
    assert dashboards
    kubectl("create", "namespace", EXAMPLE)
    yield EXAMPLE
    kubectl("delete", "namespace", EXAMPLE, "--wait")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda file: file.stem)
def test_each_pod_is_as_its_imitation(namespace: str, example: Path) -> None:
    """That of `make test-images`, which runs such pods."""
    objects = ray_objects("graft", str(CHART), "--values", str(example))
    kubectl("-n", namespace, "create", "-f", "-", stdin=yaml.safe_dump_all(objects))
    for owner in objects:
        if owner["kind"] == "ServiceAccount":
            continue
        owner["metadata"]["namespace"] = namespace
        selector = f"app.kubernetes.io/component={owner['metadata']['labels']['app.kubernetes.io/component']}"
        found = until(lambda selector=selector: items(namespace, "pods", "-l", selector), f"No pods of {selector}")
        cluster = found[0]["metadata"]["labels"]["ray.io/cluster"]
        expected = list(kuberay.pods(owner, cluster))
        until(
            lambda cluster=cluster, expected=expected: len(pods_of(cluster, namespace)) >= len(expected),
            f"{cluster} lacks pods",
        )
        by_group = {pod["metadata"]["labels"]["ray.io/group"]: made(pod) for pod in pods_of(cluster, namespace)}
        assert len(by_group) == len(expected)
        for template in expected:
            group = template["metadata"]["labels"]["ray.io/group"]
            pod = by_group[group]
            first, *beside = pod["spec"].pop("containers")
            assert lacks(template["spec"].pop("containers"), [first]) == [], group
            assert lacks(template["spec"], pod["spec"]) == [], group
            assert pod["metadata"]["labels"] == template["metadata"]["labels"], group
            assert lacks(template["metadata"].get("annotations", {}), pod["metadata"]["annotations"]) == [], group
            assert [one["name"] for one in beside] == ["autoscaler"] * ("no-monitor" in first["args"][0]), group


@pytest.mark.usefixtures("release")
def test_services_lead_to_the_pods_that_answer(dashboards: Dashboards) -> None:
    cluster = serving()
    head, worker = pods_of(cluster)
    services = {one["metadata"]["name"]: one["spec"] for one in items(NAMESPACE, "services")}
    ports = {name: {port["name"]: port["port"] for port in one["ports"]} for name, one in services.items()}
    assert ports["graft-inference"] == {"serve": 8000, "serve-grpc": 9000}
    assert {"client": 10001, "gcs-server": 6379, "dashboard": 8265}.items() <= ports[f"{TRAINING}-head-svc"].items()

    def behind(service: str) -> set[str]:
        told = json.loads(kubectl("-n", NAMESPACE, "get", "endpoints", service, "-o", "json"))
        places = [place for subset in told.get("subsets", []) for place in subset.get("addresses", [])]
        return {place["targetRef"]["name"] for place in places}

    until(lambda: behind("graft-inference"), "Nobody is behind inference's Service")
    assert behind("graft-inference") == {worker["metadata"]["name"]}  # the head has no engine
    assert behind(f"{cluster}-head-svc") == {head["metadata"]["name"]}
    assert behind(f"{TRAINING}-head-svc") == {pods_of(TRAINING)[0]["metadata"]["name"]}
    (service,) = items(NAMESPACE, "rayservice")
    assert dashboards.told[cluster] == yaml.safe_load(service["spec"]["serveConfigV2"])
    until(lambda: ("Ready", "True") in conditions(items(NAMESPACE, "rayservice")[0]), "The RayService is not ready")
    assert ("RayClusterProvisioned", "True") in conditions(
        json.loads(kubectl("-n", NAMESPACE, "get", "raycluster", TRAINING, "-o", "json"))
    )


@pytest.mark.usefixtures("release")
def test_network_policies_find_the_pods() -> None:
    policies = {one["metadata"]["name"]: one["spec"]["podSelector"] for one in items(NAMESPACE, "networkpolicy")}

    def found_by(pod: Object) -> set[str]:
        labels = pod["metadata"]["labels"].items()
        return {name for name, selector in policies.items() if selector["matchLabels"].items() <= labels}

    head, worker = pods_of(TRAINING)
    assert found_by(head) == {"graft-default", "graft-training", "graft-autoscaler"}
    assert found_by(worker) == {"graft-default", "graft-training"}
    for pod in pods_of(serving()):
        assert found_by(pod) == {"graft-default", "graft-inference"}


@pytest.mark.usefixtures("release")
def test_the_training_head_may_no_more_than_the_chart_says() -> None:
    def may(verb: str, resource: str) -> bool:
        user = f"--as=system:serviceaccount:{NAMESPACE}:graft-autoscaler"
        return kubectl("-n", NAMESPACE, "auth", "can-i", verb, resource, user, check=False).strip() == "yes"

    assert may("patch", f"rayclusters.ray.io/{TRAINING}")
    assert may("list", "pods")
    assert not may("patch", "pods")
    assert not may("patch", f"rayclusters.ray.io/{serving()}")


@pytest.mark.usefixtures("release")
def test_nodes_come_and_go_as_rays_autoscaler_writes() -> None:
    before = ids(pods_of(TRAINING))

    def write(**changes: object) -> None:
        at = "/spec/workerGroupSpecs/0"
        patch = [{"op": "add", "path": f"{at}/{key}", "value": value} for key, value in changes.items()]
        kubectl("-n", NAMESPACE, "patch", "raycluster", TRAINING, "--type=json", "-p", json.dumps(patch))

    write(replicas=2)
    more = until(lambda: ready(TRAINING, 3), "No node is added")
    assert before < ids(more)
    idle = more[-1]
    write(replicas=1, scaleStrategy={"workersToDelete": [idle["metadata"]["name"]]})
    until(lambda: len(pods_of(TRAINING)) == 2, "No node is taken away")
    assert ids(pods_of(TRAINING)) == ids(more) - ids([idle])
    write(scaleStrategy={})


@pytest.mark.usefixtures("release")
@pytest.mark.parametrize("change", ["inference.maxLoras=8", "inference.workers.replicas=2"])
def test_a_change_of_inference_starts_a_second_cluster(
    dashboards: Dashboards, values: tuple[str, ...], change: str
) -> None:
    first, training = serving(), ids(pods_of(TRAINING))
    helm_does(helm_path("helm4"), NAMESPACE, "upgrade", *values, "--set", change)
    pending = until(lambda: serving("pending"), "No second cluster is started")
    until(lambda: pending in dashboards.told, "It is not told what to serve")
    service = json.loads(kubectl("-n", NAMESPACE, "get", "service", "graft-inference", "-o", "json"))
    assert service["spec"]["selector"]["ray.io/cluster"] == first == serving()
    assert take_over(dashboards) == pending
    until(lambda: not pods_of(first), "The first cluster stays")
    assert ids(pods_of(TRAINING)) == training


@pytest.mark.usefixtures("release")
@pytest.mark.parametrize(
    "change",
    [
        "images.ray.tag=another",
        "training.idleTimeoutSeconds=77",
        "training.workerGroups.cpu.tolerations[0].operator=Exists",
    ],
)
def test_changed_pods_of_training_are_made_anew(values: tuple[str, ...], change: str) -> None:
    before = ids(pods_of(TRAINING))
    helm_does(helm_path("helm4"), NAMESPACE, "upgrade", *values, "--set", change)
    until(lambda: ready(TRAINING, 2) and not ids(pods_of(TRAINING)) & before, "Pods of before stay")


@pytest.mark.usefixtures("release")
def test_numbers_of_nodes_make_no_pod_of_training_anew(values: tuple[str, ...]) -> None:
    helm_does(helm_path("helm4"), NAMESPACE, "upgrade", *values)
    before = ids(until(lambda: ready(TRAINING, 2), "Training is not ready"))
    helm_does(helm_path("helm4"), NAMESPACE, "upgrade", *values, "--set", "training.workerGroups.cpu.minReplicas=2")
    assert before < ids(until(lambda: ready(TRAINING, 3), "No node is added"))


def test_an_uninstall_leaves_nothing(release: set[tuple[str, str]]) -> None:
    """As the last of them."""
    helm_does(helm_path("helm4"), NAMESPACE, "uninstall", "graft", "--wait", "--timeout", "120s")
    assert await_names(NAMESPACE, release) == set()
