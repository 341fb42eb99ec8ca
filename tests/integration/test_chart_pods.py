"""What an operator sets on the chart's pods, how they come and go, and what the objects are called."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from graft.registry.catalog import given_file, own_file
from graft.settings import load
from tests.support.chart import CHART, LAPTOP, Object, Pod, helm, helm_path, of_kind, pods, render, template
from tests.support.chart_values import EVERYTHING, PART, PODS

__all__ = ["helm"]

pytestmark = pytest.mark.integration

OUTSIDE: Object = {"baseModel": "smollm2-135m", "database": {"existingSecret": "db"}}
HOOKS = ("migrate", "test")
"""What has a gateway's placement, and nothing of its own."""
PLACE: Object = {"tolerations": [{"key": "dedicated", "operator": "Exists"}]}


def test_what_is_set_for_all_pods_is_on_each(helm: Path) -> None:
    found = list(pods(render(helm, EVERYTHING)))
    assert {"gateway", "orchestrator", "training", "inference", "mlflow", "postgresql", "migrate", "test"} == {
        pod.component for pod in found
    }
    for pod in found:
        assert pod.labels["team"] == "ml", pod.name
        assert pod.metadata["annotations"]["mesh"] == "off", pod.name
        if pod.component == "postgresql":  # an image of somebody else's
            continue
        (volume,) = PODS["volumes"]
        assert volume in pod.spec["volumes"], pod.name
        for container in pod.containers:
            assert PODS["env"][0] in container["env"], pod.name
            assert PODS["volumeMounts"][0] in container["volumeMounts"], pod.name


def test_each_part_has_its_own_class_place_annotations_and_variables(helm: Path) -> None:
    for pod in pods(render(helm, EVERYTHING)):
        if pod.component not in HOOKS:
            assert pod.metadata["annotations"]["for"] == "part", pod.name
        assert pod.spec["nodeSelector"] == PART["nodeSelector"], pod.name
        assert PART["tolerations"][0] in pod.spec["tolerations"], pod.name
        assert pod.spec["affinity"] == PART["affinity"], pod.name
        assert pod.spec["priorityClassName"] == "high", pod.name
        worker = pod.component in ("training", "inference") and not pod.name.endswith("/head")
        assert pod.spec.get("runtimeClassName") == ("nvidia" if worker else None), pod.name
        if pod.component not in (*HOOKS, "postgresql"):
            assert PART["env"][0] in pod.containers[-1]["env"], pod.name


def test_a_gpu_group_is_let_onto_tainted_nodes_by_default(helm: Path) -> None:
    values: Object = {"baseModel": "smollm2-135m", "training": {"workerGroups": {"gpu": {"enabled": True}}}}
    (gpu,) = [pod for pod in pods(render(helm, values)) if pod.name.endswith("/gpu")]
    assert gpu.spec["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]


def test_accounts_carry_a_clouds_role(helm: Path) -> None:
    accounts = of_kind(render(helm, EVERYTHING), "ServiceAccount")
    assert {name: one["metadata"]["annotations"] for name, one in accounts.items()} == {
        "r-graft": {"role": "own"},
        "r-graft-autoscaler": {"role": "own"},
    }


def _stop(pod: Pod) -> tuple[float, int]:
    """For how long a pod goes on before it is told to end, and when it is killed."""
    *_, command = pod.containers[-1]["lifecycle"]["preStop"]["exec"]["command"]
    (seconds,) = re.findall(r"\d+", command)
    return float(seconds), pod.spec["terminationGracePeriodSeconds"]


def test_what_answers_leaves_the_services_before_it_ends_and_has_the_time_to(helm: Path) -> None:
    values: Object = {
        **OUTSIDE,
        "gateway": {"drainSeconds": 20, "shutdownGraceSeconds": 90},
        "inference": {"drainSeconds": 200},
    }
    found = {pod.name: pod for pod in pods(render(helm, values))}
    drained, killed = _stop(found["Deployment/r-graft-gateway"])
    assert drained == 20
    assert killed > 20 + 90
    drained, killed = _stop(found["RayService/r-graft-inference/engines"])
    assert drained == 200  # Ray's own process ends as soon as it is told to
    assert killed > 200
    service = of_kind(render(helm, values), "RayService")["r-graft-inference"]["spec"]
    assert service["rayClusterDeletionDelaySeconds"] == 200


def test_a_change_of_what_engines_are_told_makes_a_new_cluster_of_them(helm: Path) -> None:
    def cluster(*options: str) -> Object:
        spec = of_kind(render(helm, LAPTOP, *options), "RayService")["r-graft-inference"]["spec"]
        assert spec["upgradeStrategy"] == {"type": "NewCluster"}
        told: Object = spec["rayClusterConfig"]
        return told

    # In a cluster that stays Serve restarts its engines, of which there may be one.
    assert cluster("--set", "inference.maxLoras=7") != cluster()
    assert cluster("--set", "gateway.replicas=3") == cluster()


def test_of_several_engines_one_at_a_time_is_evicted(helm: Path) -> None:
    def budgets(values: Object) -> dict[str, Object]:
        return {name: one["spec"] for name, one in of_kind(render(helm, values), "PodDisruptionBudget").items()}

    assert set(budgets(OUTSIDE)) == {"r-graft-gateway", "r-graft-orchestrator"}
    group = {"replicas": 2, "resources": {"requests": {"cpu": "1"}}}
    found = budgets({**OUTSIDE, "inference": {"workers": {"replicas": 3}, "workerGroups": {"more": group}}})
    assert found["r-graft-inference"]["minAvailable"] == 4
    assert found["r-graft-inference"]["selector"]["matchLabels"]["ray.io/node-type"] == "worker"


def test_hooks_leave_nothing_for_ever(helm: Path) -> None:
    objects = render(helm, OUTSIDE)
    job = of_kind(objects, "Job")["r-graft-migrate"]
    assert job["spec"]["ttlSecondsAfterFinished"] > 0
    for hook in (job, of_kind(objects, "Pod")["r-graft-test"]):
        assert hook["metadata"]["annotations"]["helm.sh/hook-delete-policy"] == "before-hook-creation,hook-succeeded"


SERVICE_NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
LONG = "a-release-of-fifty-three-characters-for-a-long-name-"


@pytest.mark.parametrize("release", ["graft", "my.release", f"{LONG}1"])
def test_any_name_of_a_release_makes_names_that_kubernetes_and_kuberay_take(helm: Path, release: str) -> None:
    for one in render(helm, EVERYTHING, release=release):
        name, kind = one["metadata"]["name"], one["kind"]
        assert SERVICE_NAME.fullmatch(name), (kind, name)
        # Of ray-operator/controllers/ray/utils/constant.go.
        assert len(name) <= {"RayCluster": 53, "RayService": 47}.get(kind, 63), (kind, name)
        for label, value in one["metadata"]["labels"].items():
            assert len(value) <= 63, (kind, label)


def test_two_releases_of_one_namespace_share_no_object_and_select_no_pod_of_the_other(helm: Path) -> None:
    def names(release: str) -> set[tuple[str, str]]:
        return {(one["kind"], one["metadata"]["name"]) for one in render(helm, EVERYTHING, release=release)}

    assert not names(f"{LONG}1") & names(f"{LONG}2")
    for one in render(helm, EVERYTHING, release="other"):
        for selector in _selectors(one):
            assert selector["app.kubernetes.io/instance"] == "other", one["metadata"]["name"]


def _selectors(node: object) -> list[dict[str, str]]:
    """Every selector of the release's own pods in an object."""
    if isinstance(node, list):
        return [found for item in node for found in _selectors(item)]
    if not isinstance(node, dict):
        return []
    own = [node["matchLabels"]] if "app.kubernetes.io/part-of" in node.get("matchLabels", {}) else []
    return own + [found for value in node.values() for found in _selectors(value)]


def test_a_name_that_a_service_could_not_have_is_refused_with_what_to_do(helm: Path) -> None:
    told = template(helm, LAPTOP, release="2026")
    assert "set fullnameOverride" in told.stderr
    assert template(helm, LAPTOP, "--set", "fullnameOverride=graft-2026", release="2026").returncode == 0


def test_the_services_grpc_is_told_to_be_http2_where_it_is_without_tls(helm: Path) -> None:
    def grpc(values: Object) -> Object:
        ports: list[Object] = of_kind(render(helm, values), "Service")["r-graft-gateway"]["spec"]["ports"]
        return next(port for port in ports if port["name"] == "grpc")

    assert grpc(OUTSIDE)["appProtocol"] == "kubernetes.io/h2c"
    assert "appProtocol" not in grpc({**OUTSIDE, "gateway": {"tlsSecret": "tls"}})


def test_nginx_lets_uploads_and_slow_answers_through(helm: Path) -> None:
    enabled = {protocol: {"enabled": True} for protocol in ("http", "grpc")}
    for one in of_kind(render(helm, {**OUTSIDE, "ingress": enabled}), "Ingress").values():
        annotations = one["metadata"]["annotations"]
        assert annotations["nginx.ingress.kubernetes.io/proxy-body-size"] == "512m"  # gateway.maxUploadBytes
        assert annotations["nginx.ingress.kubernetes.io/proxy-read-timeout"] == "3600"


def _notes(*options: str) -> str:
    """What is told after an install, without a cluster, which Helm 4 alone can do."""
    command = [helm_path("helm4"), "install", "r", CHART, "--namespace", "ns", "--dry-run=client", *options]
    told = subprocess.run([*map(str, command), "--set", "kuberay.check=false"], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    return told.stdout.partition("\nNOTES:\n")[2]


def test_the_notes_tell_how_to_ask_and_what_a_trial_is_not() -> None:
    trial = _notes("--set", "baseModel=smollm2-135m,networkPolicy.enabled=false")
    for said in ("port-forward service/r-graft-gateway 50051 8080", "get secret r-graft-api-key", "helm test r -n ns"):
        assert said in trial
    for warned in ("PostgreSQL is for trials only", "ReadWriteOnce", "networkPolicy.enabled is false"):
        assert warned in trial
    assert "asks for no token" not in trial  # the internal gRPC does
    assert "--server-side=false" in trial  # of Helm 4
    real = _notes(
        *("--set", "baseModel=smollm2-135m,database.existingSecret=db,gateway.existingApiKeySecret=key"),
        *("--set", "storage.kind=s3,storage.s3.url=s3://bucket,gateway.tlsSecret=tls,test.enabled=false"),
    )
    assert "WARNING" not in real
    assert "helm test" not in real
    assert "get secret key " in real
    assert "GRAFT_ADDRESS=https://" in real


@pytest.mark.parametrize(
    ("changed", "marked"),
    [
        ({"inference": {"workers": {"replicas": 2}}}, "RayService/r-graft-inference/head"),
        ({"inference": {"head": PLACE}}, "RayService/r-graft-inference/head"),
        ({"inference": {"workers": PLACE}}, "RayService/r-graft-inference/engines"),
        ({"training": {"head": PLACE}}, "RayCluster/r-graft-training/head"),
        ({"training": {"workerGroups": {"cpu": PLACE}}}, "RayCluster/r-graft-training/cpu"),
    ],
)
def test_what_kuberay_does_not_look_at_is_an_annotation_too(helm: Path, changed: Object, marked: str) -> None:
    """It makes pods anew when its hash of a cluster changes, which has no tolerations and no numbers of nodes."""

    def marks(values: Object) -> dict[str, Object]:
        found = pods(render(helm, {"baseModel": "smollm2-135m", **values}))
        return {pod.name: pod.metadata.get("annotations", {}) for pod in found if "/r-graft-" in pod.name}

    before, after = marks({}), marks(changed)
    assert {name for name in before if before[name] != after[name]} == {marked}


def test_the_catalogue_is_the_file_that_graft_only_reads(helm: Path) -> None:
    """A full model that is deployed becomes an entry of the other one, which nothing may be mounted on."""
    rendered = render(helm, {**OUTSIDE, "baseModel": "mine", "catalog": {"mine": {"folder": "/m"}}})
    mounted = 0
    for pod in pods(rendered):
        for container in pod.containers:
            variables = {one["name"]: one.get("value", "") for one in container.get("env", [])}
            mounts = {one["mountPath"]: one for one in container.get("volumeMounts", [])}
            home = variables.get("GRAFT_HOME", "")
            if mounts.get(home, {}).get("name") == "state":
                settings = load({"GRAFT_HOME": home})
                assert str(own_file(settings)) not in mounts
                mount = mounts[str(given_file(settings))]
                mounted += 1
                (config,) = [one for one in of_kind(rendered, "ConfigMap").values() if mount["subPath"] in one["data"]]
                assert yaml.safe_load(config["data"][mount["subPath"]]) == {"mine": {"folder": "/m"}}
    assert mounted >= 5
