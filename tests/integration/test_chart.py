"""The chart as both Helms render it: every example, the settings in it, and what it says of values that are wrong."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from graft import settings
from tests.support.chart import CHART, EXAMPLES, LAPTOP, ROOT, Object, helm, helm_path, of_kind, render, run, template
from tests.support.chart_values import EVERYTHING
from tests.support.kubernetes_schemas import (
    ELSEWHERE,
    KUBERAY,
    VERSIONS,
    elsewhere_faults,
    kuberay_archive,
    kuberay_faults,
    kubernetes_faults,
)

__all__ = ["helm"]

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("values", EXAMPLES, ids=lambda file: file.stem)
def test_every_example_passes_lint(helm: Path, values: Path) -> None:
    told = run(helm, "lint", "--strict", str(CHART), "--values", str(values))
    assert told.returncode == 0, told.stdout + told.stderr


@pytest.mark.parametrize("values", [*EXAMPLES, EVERYTHING], ids=lambda values: getattr(values, "stem", "everything"))
def test_both_helms_render_the_same(values: Path | Object) -> None:
    three, four = (
        [one for one in render(helm_path(name), values) if one["kind"] != "Secret"] for name in ("helm3", "helm4")
    )
    assert three == four


@pytest.mark.parametrize("values", [*EXAMPLES, EVERYTHING], ids=lambda values: getattr(values, "stem", "everything"))
def test_kubernetes_takes_what_every_example_renders(values: Path | Object) -> None:
    objects = render(helm_path("helm4"), values)
    assert [fault for one in objects for version in VERSIONS for fault in kubernetes_faults(one, version)] == []


@pytest.mark.parametrize("values", [*EXAMPLES, EVERYTHING], ids=lambda values: getattr(values, "stem", "everything"))
def test_kuberay_takes_what_every_example_renders(values: Path | Object) -> None:
    archive = kuberay_archive()
    objects = [one for one in render(helm_path("helm4"), values) if one["kind"] in KUBERAY]
    assert {one["kind"] for one in objects} == set(KUBERAY)
    assert [fault for one in objects for fault in kuberay_faults(archive, one)] == []


def test_gateway_api_and_prometheus_take_what_every_example_renders(helm: Path) -> None:
    objects = [one for values in (*EXAMPLES, EVERYTHING) for one in render(helm, values)]
    kinds = {one["kind"] for one in objects if one["apiVersion"].partition("/")[0] in ELSEWHERE}
    assert kinds == {"HTTPRoute", "GRPCRoute", "ServiceMonitor", "PodMonitor", "PrometheusRule"}
    assert elsewhere_faults(objects) == []


def test_their_definitions_find_what_does_not_exist_and_what_is_mistyped(helm: Path) -> None:
    objects = render(helm, EVERYTHING)
    wrong = {kind: next(iter(of_kind(objects, kind).values())) for kind in ("HTTPRoute", "GRPCRoute", "ServiceMonitor")}
    wrong["HTTPRoute"]["spec"]["rules"][0]["backendRef"] = {}
    wrong["GRPCRoute"]["spec"]["rules"][0]["backendRefs"][0]["port"] = "grpc"
    wrong["ServiceMonitor"]["spec"]["endpoints"][0]["scheme"] = "gopher"
    assert {fault.partition(" {")[0] for fault in elsewhere_faults(list(wrong.values()))} == {
        "HTTPRoute r-graft /spec/rules/0/backendRef: unknown",
        "GRPCRoute r-graft /spec/rules/0/backendRefs/0/port: type",
        "ServiceMonitor r-graft-gateway /spec/endpoints/0/scheme: enum",
    }


def test_strict_schemas_find_a_field_that_does_not_exist(helm: Path) -> None:
    objects = render(helm, LAPTOP)
    deployment = of_kind(objects, "Deployment")["r-graft-gateway"]
    deployment["spec"]["template"]["spec"]["containers"][0]["imagePolicy"] = "Always"
    assert kubernetes_faults(deployment, "1.37")
    cluster = of_kind(objects, "RayCluster")["r-graft-training"]
    cluster["spec"]["headGroupSpec"]["templates"] = {}
    assert kuberay_faults(kuberay_archive(), cluster)


def test_the_base_model_is_all_that_has_to_be_set(helm: Path) -> None:
    objects = render(helm, {"baseModel": "smollm2-135m"})
    assert set(of_kind(objects, "Deployment")) == {"r-graft-gateway", "r-graft-orchestrator", "r-graft-mlflow"}
    assert set(of_kind(objects, "RayService")) == {"r-graft-inference"}
    assert set(of_kind(objects, "RayCluster")) == {"r-graft-training"}
    assert set(of_kind(objects, "StatefulSet")) == {"r-graft-postgresql"}


@pytest.mark.parametrize("values", [*EXAMPLES, EVERYTHING], ids=lambda values: getattr(values, "stem", "everything"))
def test_every_graft_yaml_is_one_that_the_processes_read(helm: Path, values: Path | Object, tmp_path: Path) -> None:
    files = [
        (name, one["data"]["graft.yaml"])
        for name, one in of_kind(render(helm, values), "ConfigMap").items()
        if "graft.yaml" in one["data"]
    ]
    assert {name for name, _ in files} == {"r-graft-gateway", "r-graft-orchestrator", "r-graft-ray"}
    for name, text in files:
        file = tmp_path / f"{name}.yaml"
        file.write_text(text)
        read = settings.load({"GRAFT_HOME": str(tmp_path), "GRAFT_CONFIG": str(file)})
        assert read.engine_address == "r-graft-inference:9000"
        assert read.serving.base_model
        if name == "r-graft-orchestrator":
            assert read.orchestrator.ray_address == "ray://r-graft-training-head-svc:10001"
            assert read.tracking_uri == "http://r-graft-mlflow:5000"


def test_the_engine_is_told_what_the_gateway_is_told(helm: Path) -> None:
    objects = render(helm, LAPTOP, "--set", "inference.maxLoras=7")
    (application,) = yaml.safe_load(of_kind(objects, "RayService")["r-graft-inference"]["spec"]["serveConfigV2"])[
        "applications"
    ]
    gateway = yaml.safe_load(of_kind(objects, "ConfigMap")["r-graft-gateway"]["data"]["graft.yaml"])
    told: dict[str, Any] = application["args"]["serving"]
    assert told == {name: value for name, value in gateway["serving"].items() if name != "address"}
    assert told["max_loras"] == 7


@pytest.mark.parametrize("values", EXAMPLES, ids=lambda file: file.stem)
def test_the_application_takes_its_arguments(values: Path) -> None:
    from graft.serving import declared  # imports Ray

    service = of_kind(render(helm_path("helm4"), values), "RayService")["r-graft-inference"]
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    (application,) = config["applications"]
    module, _, name = application["import_path"].partition(":")
    assert module == declared.__name__
    assert callable(getattr(declared, name))
    arguments = declared.Arguments.model_validate(application["args"])
    assert arguments.tracking_uri == "http://r-graft-mlflow:5000"


def test_serve_is_configured_as_for_a_cluster_of_ones_own(helm: Path) -> None:
    service = of_kind(render(helm, LAPTOP), "RayService")["r-graft-inference"]
    chart = yaml.safe_load(service["spec"]["serveConfigV2"])
    own = yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text())
    assert set(chart) == set(own)
    for key in ("proxy_location", "grpc_options", "logging_config"):
        assert chart[key] == own[key]
    for key in ("name", "route_prefix", "import_path"):
        assert chart["applications"][0][key] == own["applications"][0][key]


def test_kuberay_keeps_the_internal_grpc_in_the_service_of_inference(helm: Path) -> None:
    spec = of_kind(render(helm, LAPTOP), "RayService")["r-graft-inference"]["spec"]
    head = spec["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    # What its operator does (BuildServeService of 1.7.0): of the ports it is given it keeps those that the head has as
    # well, by names that are `serve` or begin with `serve-`.
    serving = {port["name"] for port in head["ports"] if port["name"] == "serve" or port["name"].startswith("serve-")}
    kept = {port["port"] for port in spec["serveService"]["spec"]["ports"] if port["name"] in serving}
    assert serving
    assert kept == {8000, 9000}


def test_the_store_is_migrated_before_an_upgrade_and_an_external_one_before_the_install(helm: Path) -> None:
    hooks = {
        file.stem: of_kind(render(helm, file), "Job")["r-graft-migrate"]["metadata"]["annotations"]["helm.sh/hook"]
        for file in EXAMPLES
    }
    assert hooks.pop("laptop-values") == "pre-upgrade"
    assert set(hooks.values()) == {"pre-install,pre-upgrade"}


def test_what_the_cluster_does_not_know_is_left_out(helm: Path) -> None:
    told = template(helm, LAPTOP, capabilities=("ray.io/v1",))
    assert told.returncode == 0, told.stderr
    assert not {"ServiceMonitor", "PodMonitor", "PrometheusRule"} & {
        one["kind"] for one in yaml.safe_load_all(told.stdout) if one
    }


def test_rules_and_dashboard_are_those_of_the_files(helm: Path) -> None:
    objects = render(helm, LAPTOP)
    assert of_kind(objects, "PrometheusRule")["r-graft"]["spec"] == yaml.safe_load(
        (CHART / "files" / "prometheus-rules.yaml").read_text()
    )
    assert json.loads(of_kind(objects, "ConfigMap")["r-graft-dashboard"]["data"]["graft.json"]) == json.loads(
        (CHART / "files" / "grafana-dashboard.json").read_text()
    )


def test_helm_test_runs_the_file_that_the_repository_tests(helm: Path) -> None:
    script = of_kind(render(helm, LAPTOP), "ConfigMap")["r-graft-test"]["data"]["train_and_ask.py"]
    assert script == (CHART / "files" / "train_and_ask.py").read_text()


def test_the_readme_is_what_the_values_say() -> None:
    told = subprocess.run([sys.executable, ROOT / "helm" / "readme", "--check"], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr


def test_every_value_is_documented_and_has_a_schema() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())
    page = (CHART / "README.md").read_text()

    def check(value: Object, node: Object, path: str) -> None:
        for key, inner in value.items():
            where = f"{path}.{key}".removeprefix(".")
            known = node["properties"][key]
            known = schema["definitions"][known["$ref"].rpartition("/")[2]] if "$ref" in known else known
            if f"| `{where}` |" not in page:
                assert isinstance(inner, dict), f"{where} is not documented"
                assert known["additionalProperties"] is False, where
                check(inner, known, where)

    check(values, schema, "")


def test_without_kuberay_the_message_says_how_to_install_it(helm: Path) -> None:
    told = template(helm, LAPTOP, capabilities=())
    assert told.returncode != 0
    assert "KubeRay's operator is not installed" in told.stderr
    assert "helm install kuberay-operator" in told.stderr
    assert template(helm, LAPTOP, "--set", "kuberay.check=false", capabilities=()).returncode == 0


WRONG: list[tuple[Object, str, str]] = [
    ({"baseModel": ""}, "baseModel is not set: name the base model", ""),
    ({"baseModel": "Not A Name"}, "baseModel: Does not match pattern", "'/baseModel': 'Not A Name' does not match"),
    ({"baseModel": "other", "catalog": {"mine": {"folder": "/m"}}}, "neither in catalog nor part of the images", ""),
    ({"gatway": {}}, "Additional property gatway is not allowed", "additional properties 'gatway' not allowed"),
    (
        {"gateway": {"replcas": 3}},
        "gateway: Additional property replcas is not allowed",
        "at '/gateway': additional properties 'replcas' not allowed",
    ),
    (
        {"gateway": {"replicas": "two"}},
        "gateway.replicas: Invalid type. Expected: integer, given: string",
        "at '/gateway/replicas': got string, want integer",
    ),
    (
        {"gateway": {"replicas": 0}},
        "gateway.replicas: Must be greater than or equal to 1",
        "'/gateway/replicas': minimum",
    ),
    ({"gateway": {"autoscaling": {"minReplicas": 20}}}, "gateway.autoscaling.minReplicas is greater", ""),
    (
        {"storage": {"kind": "nfs"}},
        "storage.kind must be one of the following",
        "'/storage/kind': value must be one of",
    ),
    ({"storage": {"kind": "s3"}}, "storage.s3.url is empty: set it to a bucket", ""),
    (
        {"storage": {"s3": {"url": "bucket"}}},
        "storage.s3.url: Does not match pattern",
        "'/storage/s3/url': 'bucket' does",
    ),
    (
        {"images": {"ray": {"digest": "sha256:12"}}},
        "images.ray.digest: Does not match pattern",
        "'/images/ray/digest': 'sha256:12' does not match",
    ),
    (
        {"inference": {"maxLoraRank": 24}},
        "inference.maxLoraRank must be one of the following",
        "'/inference/maxLoraRank': value must be one of",
    ),
    (
        {"inference": {"workers": {"resources": {"requests": {"memory": "4 GB"}}}}},
        "inference.workers.resources.requests.memory: Does not match pattern",
        "'/inference/workers/resources/requests/memory': '4 GB' does not match",
    ),
    (
        {"training": {"workerGroups": {"cpu": {"minReplicas": 9}}}},
        "training.workerGroups.cpu: minReplicas is greater than maxReplicas",
        "",
    ),
    (
        {"training": {"workerGroups": {"h100": {"minReplicas": 0, "maxReplicas": 1}}}},
        "training.workerGroups.h100: resources is required",
        "'/training/workerGroups/h100': missing property 'resources'",
    ),
    (
        {"training": {"worker": {"gpus": 2}}},
        "training.worker.gpus: Must be less than or equal to 1",
        "'/training/worker/gpus': maximum: got 2, want 1",
    ),
    (
        {"inference": {"pools": {"large": {"labelSelector": {"pool": "in("}}}}},
        "inference.pools.large.labelSelector.pool: Does not match pattern",
        "'/inference/pools/large/labelSelector/pool': 'in(' does not match",
    ),
    (
        {"inference": {"workerGroups": {"small": {"gpus": 1}}}},
        "inference.workerGroups.small: resources is required",
        "'/inference/workerGroups/small': missing property 'resources'",
    ),
    ({"gatewayApi": {"httpRoute": {"enabled": True}}}, "gatewayApi.parentRefs is empty", ""),
    (
        {"training": {"pools": {"large": {"gpus": 1}}}},
        "training.pools.large: no group of training.workerGroups that is on has 1 CPU, 1 GPU on one node",
        "",
    ),
    (
        {"training": {"worker": {"labelSelector": {"pool": "a"}}}},
        "training.worker: no group of training.workerGroups that is on has 1 CPU, 0 GPU and the labels pool=a on",
        "",
    ),
    ({"training": {"quantizedBase": True}}, "training.quantizedBase is set, and training.worker asks for no GPU", ""),
    (
        {"inference": {"replicas": 4, "workers": {"gpus": 2}}},
        "inference.replica: 4 engines ask for 0 CPU, 1 GPU each, and inference.workers and workerGroups have room",
        "",
    ),
    ({"pods": {"labels": {"app.kubernetes.io/name": "x"}}}, "pods.labels: app.kubernetes.io/name is a label by", ""),
    (
        {"pods": {"volumeMounts": [{"name": "own"}]}},
        "pods.volumeMounts.0: mountPath is required",
        "'/pods/volumeMounts/0': missing property 'mountPath'",
    ),
    (
        {"gateway": {"env": [{"name": "A", "vlue": "1"}]}},
        "gateway.env.0: Additional property vlue is not allowed",
        "at '/gateway/env/0': additional properties 'vlue' not allowed",
    ),
    (
        {"networkPolicy": {"storage": {"cidrs": []}}},
        "networkPolicy.storage: cidrs and peers are both empty",
        "",
    ),
    (
        {"networkPolicy": {"database": {"cidrs": ["db.internal"]}}},
        "networkPolicy.database.cidrs.0: Does not match pattern",
        "'/networkPolicy/database/cidrs/0': 'db.internal' does not match",
    ),
]


@pytest.mark.parametrize(("wrong", "helm3_says", "helm4_says"), WRONG, ids=lambda value: str(value)[:50])
def test_a_wrong_value_is_named_with_what_is_wrong(helm: Path, wrong: Object, helm3_says: str, helm4_says: str) -> None:
    told = template(helm, {"baseModel": "smollm2-135m", **wrong})
    assert told.returncode != 0
    assert (helm3_says if "helm3" in helm.name else helm4_says or helm3_says) in told.stderr
