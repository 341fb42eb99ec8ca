"""What the chart's pods may do: as whom they run, and which tokens and secrets they hold."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from graft.internal.token import VARIABLE
from tests.support.chart import EXAMPLES, LAPTOP, ROOT, Object, helm, helm_path, of_kind, pods, render

__all__ = ["helm"]

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("values", EXAMPLES, ids=lambda file: file.stem)
def test_every_container_is_confined_and_has_its_resources(helm: Path, values: Path) -> None:
    found = list(pods(render(helm, values)))
    assert {"gateway", "orchestrator", "mlflow", "training", "inference", "migrate", "test"} <= {
        pod.component for pod in found
    }
    for pod in found:
        security = pod.spec["securityContext"]
        assert security["runAsNonRoot"] is True, pod.name
        assert security["runAsUser"] > 0, pod.name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, pod.name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod.spec), pod.name
        assert not any("hostPath" in volume for volume in pod.spec["volumes"]), pod.name
        for container in pod.containers:
            where = f"{pod.name}/{container['name']}"
            own = container["securityContext"]
            assert own["allowPrivilegeEscalation"] is False, where
            assert own["readOnlyRootFilesystem"] is True, where
            assert own["capabilities"] == {"drop": ["ALL"]}, where
            assert set(container["resources"]["requests"]) == {"cpu", "memory"}, where
            assert "memory" in container["resources"]["limits"], where
            assert {"name": "tmp", "mountPath": "/tmp"} in container["volumeMounts"], where


def test_the_container_that_kuberay_adds_for_the_autoscaler_is_confined_too(helm: Path) -> None:
    spec = of_kind(render(helm, LAPTOP), "RayCluster")["r-graft-training"]["spec"]
    options, head = spec["autoscalerOptions"], spec["headGroupSpec"]["template"]["spec"]
    assert options["securityContext"] == head["containers"][0]["securityContext"]
    assert set(options["resources"]["requests"]) == {"cpu", "memory"}
    # Its root is read-only; the volume is one of the head's pod, of which it is a part.
    (tmp,) = [mount for mount in options["volumeMounts"] if mount["mountPath"] == "/tmp"]
    assert tmp["name"] in {volume["name"] for volume in head["volumes"]}


def test_mounts_have_their_volumes(helm: Path) -> None:
    for values in EXAMPLES:
        for pod in pods(render(helm, values)):
            volumes = [volume["name"] for volume in pod.spec["volumes"]]
            mounted = {mount["name"] for container in pod.containers for mount in container["volumeMounts"]}
            assert len(volumes) == len(set(volumes)), pod.name
            assert mounted == set(volumes), pod.name


def test_only_the_autoscaler_has_a_token_and_may_only_what_it_needs(helm: Path) -> None:
    objects = render(helm, LAPTOP)
    holders = {pod.name for pod in pods(objects) if pod.spec["automountServiceAccountToken"] is not False}
    assert holders == {"RayCluster/r-graft-training/head"}
    (head,) = [pod for pod in pods(objects) if pod.name in holders]
    assert head.spec["serviceAccountName"] == "r-graft-autoscaler"
    # KubeRay adds wider ones where none has the name of the RayCluster.
    (role,) = of_kind(objects, "Role").values()
    assert role["metadata"]["name"] == "r-graft-training"
    assert role["rules"] == [
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]},
        {
            "apiGroups": ["ray.io"],
            "resources": ["rayclusters"],
            "resourceNames": ["r-graft-training"],
            "verbs": ["get", "patch"],
        },
    ]
    (binding,) = of_kind(objects, "RoleBinding").values()
    assert binding["metadata"]["name"] == binding["roleRef"]["name"] == "r-graft-training"
    assert [subject["name"] for subject in binding["subjects"]] == ["r-graft-autoscaler"]
    assert not [one["kind"] for one in objects if one["kind"].startswith("Cluster")]


@pytest.mark.parametrize("values", EXAMPLES, ids=lambda file: file.stem)
def test_secrets_come_by_reference_only(helm: Path, values: Path) -> None:
    objects = render(helm, values)
    contents = {
        value
        for secret in of_kind(objects, "Secret").values()
        for value in secret["stringData"].values()
        if value != "graft"  # a user's name
    }
    elsewhere = str([one for one in objects if one["kind"] != "Secret"])
    assert not [value for value in contents if value in elsewhere]
    for pod in pods(objects):
        for container in pod.containers:
            for variable in container.get("env", []):
                name = variable["name"].removesuffix("TOKEN_FILE")  # where it lies may be known
                secret = any(word in name for word in ("TOKEN", "PASSWORD", "SECRET", "API_KEY", "STORE_U"))
                assert not (secret and "value" in variable), f"{pod.name}: {variable['name']}"


def test_ray_asks_everybody_for_a_token(helm: Path) -> None:
    objects = render(helm, LAPTOP)
    expected = {"mode": "token", "secretName": "r-graft-ray-token"}
    assert of_kind(objects, "RayCluster")["r-graft-training"]["spec"]["authOptions"] == expected
    service = of_kind(objects, "RayService")["r-graft-inference"]
    assert service["spec"]["rayClusterConfig"]["authOptions"] == expected
    (orchestrator,) = [pod for pod in pods(objects) if pod.component == "orchestrator"]
    variables = {variable["name"]: variable for variable in orchestrator.containers[-1]["env"]}
    assert variables["RAY_AUTH_MODE"]["value"] == "token"
    assert variables["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {
        "name": "r-graft-ray-token",
        "key": "auth_token",
    }


@pytest.mark.parametrize("named", [None, "engine-door"])
def test_the_internal_grpc_asks_everybody_for_a_token(helm: Path, named: str | None) -> None:
    values: Object = {"baseModel": "smollm2-135m", "inference": {"existingTokenSecret": named or ""}}
    objects = render(helm, values)
    secret, file = named or "r-graft-engine-token", "/etc/graft-engine/token"
    assert ("r-graft-engine-token" in of_kind(objects, "Secret")) is (named is None)
    holders = set()
    for pod in pods(objects):
        volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
        if "engine-token" not in volumes:
            continue
        assert volumes["engine-token"]["secret"] == {
            "secretName": secret,
            "items": [{"key": "token", "path": "token"}],
        }
        mount = {"name": "engine-token", "mountPath": "/etc/graft-engine", "readOnly": True}
        assert mount in pod.containers[-1]["volumeMounts"], pod.name
        holders.add(pod.component)
    assert holders == {"gateway", "orchestrator", "training", "inference"}
    for part in ("gateway", "orchestrator"):
        settings = yaml.safe_load(of_kind(objects, "ConfigMap")[f"r-graft-{part}"]["data"]["graft.yaml"])
        assert settings["serving"]["token_file"] == file
    service = of_kind(objects, "RayService")["r-graft-inference"]["spec"]
    (application,) = yaml.safe_load(service["serveConfigV2"])["applications"]
    assert application["args"]["serving"]["token_file"] == file
    for pod in pods(objects):
        if pod.component == "training":  # whose workers read no settings
            variables = {variable["name"]: variable.get("value") for variable in pod.containers[-1]["env"]}
            assert variables[VARIABLE] == file, pod.name


def test_mlflow_answers_to_its_own_names_and_to_its_user_alone(helm: Path) -> None:
    (mlflow,) = [pod for pod in pods(render(helm, LAPTOP)) if pod.component == "mlflow"]
    (container,) = mlflow.containers
    assert "--app-name=basic-auth" in container["args"]
    (hosts,) = [argument for argument in container["args"] if argument.startswith("--allowed-hosts=")]
    names = hosts.partition("=")[2].split(",")
    assert {"r-graft-mlflow:5000", "r-graft-mlflow.ns.svc:5000"} <= set(names)
    assert "*" not in names


def test_kuberay_finds_its_own_label_on_the_pods_of_ray(helm: Path) -> None:
    for pod in pods(render(helm, LAPTOP)):
        assert "app.kubernetes.io/name" not in pod.labels, pod.name


def test_a_new_version_of_the_chart_alone_replaces_no_pod(helm: Path) -> None:
    for pod in pods(render(helm, LAPTOP)):
        assert set(pod.labels) == {
            "app.kubernetes.io/part-of",
            "app.kubernetes.io/instance",
            "app.kubernetes.io/component",
        }


def test_checkov_finds_nothing_but_the_exceptions_that_are_explained(tmp_path: Path) -> None:
    own = ROOT / "build" / "checkov" / "bin" / "checkov"
    checkov = str(own) if own.is_file() else shutil.which("checkov")
    if checkov is None:
        pytest.skip("checkov is not here: deploy/setup/checkov installs it.")
    for values in EXAMPLES:
        (tmp_path / f"{values.stem}.yaml").write_text(yaml.safe_dump_all(render(helm_path("helm4"), values)))
    command = [checkov, "--config-file", str(ROOT / "helm" / "checkov.yaml"), "-d", str(tmp_path), "-o", "json"]
    told = subprocess.run(command, capture_output=True, text=True)
    summary = json.loads(told.stdout)
    assert [(one["check_id"], one["resource"]) for one in summary["results"]["failed_checks"]] == []
    assert summary["summary"]["passed"] > 100
