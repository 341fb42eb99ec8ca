"""Whom the chart's pods may reach and who may reach them: the arrows of the design, and no others."""

import copy
from pathlib import Path

import pytest
import yaml

from tests.support.chart import EXAMPLES, LAPTOP, ROOT, Object, Pod, helm, of_kind, pods, render
from tests.support.chart_values import EVERYTHING, PEER

__all__ = ["helm"]

pytestmark = pytest.mark.integration

DATABASE, STORAGE, API = "10.0.1.0/24", "10.0.2.0/24", "10.0.3.0/24"
OUTSIDE: Object = {
    "baseModel": "smollm2-135m",
    "database": {"existingSecret": "db"},
    "storage": {"kind": "s3", "s3": {"url": "s3://bucket/x"}},
    "networkPolicy": {
        "database": {"cidrs": [DATABASE]},
        "storage": {"cidrs": [STORAGE]},
        "kubernetesApi": {"cidrs": [API], "ports": [6443]},
    },
}
ARROWS = {
    ("gateway", "inference", 9000),
    ("gateway", DATABASE, 5432),
    ("gateway", STORAGE, 443),
    ("orchestrator", "inference", 9000),
    ("orchestrator", "mlflow", 5000),
    ("orchestrator", "training", 10001),
    ("orchestrator", DATABASE, 5432),
    ("orchestrator", STORAGE, 443),
    ("training", "training", 0),
    ("training", "inference", 9000),
    ("training", "mlflow", 5000),
    ("training", STORAGE, 443),
    ("autoscaler", API, 6443),
    ("inference", "inference", 0),
    ("inference", "mlflow", 5000),
    ("inference", STORAGE, 443),
    ("mlflow", DATABASE, 5432),
    ("mlflow", STORAGE, 443),
    ("migrate", DATABASE, 5432),
    ("test", "gateway", 8080),
    ("test", "gateway", 50051),
}
"""Who may open a connection to whom, on which port; 0 is every port, and the autoscaler is in training's head.
The table of docs/kubernetes.md."""


def selects(selector: Object, pod: Pod) -> bool:
    """Whether a label selector without expressions takes a pod."""
    return selector.get("matchLabels", {}).items() <= pod.labels.items()


@pytest.mark.parametrize("values", [*EXAMPLES, OUTSIDE], ids=lambda values: getattr(values, "stem", "outside"))
def test_network_policies_cover_every_pod_in_both_directions(helm: Path, values: Path | Object) -> None:
    objects = render(helm, values)
    policies = of_kind(objects, "NetworkPolicy")
    for pod in pods(objects):
        taking = {name for name, one in policies.items() if selects(one["spec"]["podSelector"], pod)}
        assert taking == {"r-graft-default", f"r-graft-{pod.component}"}, pod.name
    autoscaler = policies.pop("r-graft-autoscaler")["spec"]
    assert autoscaler["podSelector"]["matchLabels"]["ray.io/node-type"] == "head"  # a label that KubeRay gives
    for name, policy in policies.items():
        assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"], name


def _outside(policy: Object) -> list[tuple[Object, int]]:
    """Who is asked that is no part of the release, and at which port; without names."""
    return [
        (peer, port["port"])
        for rule in policy["spec"].get("egress", [])
        for peer in rule["to"]
        for port in rule.get("ports", [])
        if port["port"] != 53 and "app.kubernetes.io/component" not in str(peer)
    ]


def test_what_lies_in_the_cluster_is_reached_by_its_pods_and_at_the_port_of_its_address(helm: Path) -> None:
    values: Object = copy.deepcopy(OUTSIDE)
    values["storage"]["s3"]["endpointUrl"] = "http://minio.minio:9000"
    values["networkPolicy"]["storage"] = {"cidrs": [], "peers": [PEER]}
    values["networkPolicy"]["database"] = {"cidrs": [DATABASE], "peers": [PEER]}
    values["networkPolicy"]["extraEgress"] = {"mlflow": [{"to": [PEER], "ports": [{"port": 81, "protocol": "TCP"}]}]}
    policies = of_kind(render(helm, values), "NetworkPolicy")
    database, storage = [({"ipBlock": {"cidr": DATABASE}}, 5432), (PEER, 5432)], [(PEER, 9000)]
    assert _outside(policies["r-graft-migrate"]) == database
    assert _outside(policies["r-graft-gateway"]) == database + storage
    assert _outside(policies["r-graft-inference"]) == storage
    assert _outside(policies["r-graft-mlflow"]) == [*database, *storage, (PEER, 81)]
    values["networkPolicy"]["storage"]["port"] = 9001  # of the pods behind another Service's port
    assert _outside(of_kind(render(helm, values), "NetworkPolicy")["r-graft-inference"]) == [(PEER, 9001)]


def test_names_are_resolved_at_addresses_too(helm: Path) -> None:
    spec = of_kind(render(helm, EVERYTHING), "NetworkPolicy")["r-graft-default"]["spec"]
    (rule,) = spec["egress"]
    assert {"ipBlock": {"cidr": "169.254.20.10/32"}} in rule["to"]


def test_the_hub_is_reached_by_those_that_fetch_from_it(helm: Path) -> None:
    objects = render(helm, EVERYTHING)
    policies = of_kind(objects, "NetworkPolicy")
    hub = ({"ipBlock": {"cidr": "0.0.0.0/0"}}, 8443)
    assert {name for name, one in policies.items() if hub in _outside(one)} == {
        "r-graft-orchestrator",
        "r-graft-inference",
    }
    fetched = {
        pod.name: [container["command"][-1] for container in pod.spec["initContainers"]]
        for pod in pods(objects)
        if "initContainers" in pod.spec
    }
    # Others are prepared by the orchestrator, which has to have them; those of a folder are there.
    assert fetched == {
        "Deployment/r-graft-orchestrator": ["theirs", "another"],
        "RayService/r-graft-inference/head": ["theirs"],
    }


def test_network_policies_allow_the_arrows_of_the_design_and_no_others(helm: Path) -> None:
    objects = render(helm, OUTSIDE)
    policies = of_kind(objects, "NetworkPolicy")
    outgoing: set[tuple[str, str, int]] = set()
    incoming: set[tuple[str, str, int]] = set()
    for name, policy in policies.items():
        component = name.removeprefix("r-graft-")
        for direction, peers, found in (("egress", "to", outgoing), ("ingress", "from", incoming)):
            for rule in policy["spec"].get(direction, []):
                for peer in rule.get(peers, []):
                    for port in [port["port"] for port in rule.get("ports", [])] or [0]:
                        if "ipBlock" in peer:
                            found.add((component, peer["ipBlock"]["cidr"], port))
                        elif "namespaceSelector" not in peer:
                            found.add(
                                (component, peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"], port)
                            )
    assert outgoing == ARROWS
    # The same arrows, seen from where they end; whoever is a client of the gateway may be anybody here.
    assert {(source, target, port) for target, source, port in incoming} == {
        arrow for arrow in ARROWS if arrow[1] in ("inference", "mlflow", "training")
    }
    anybody = [
        name for name, one in policies.items() for rule in one["spec"].get("ingress", []) if not rule.get("from")
    ]
    assert anybody == ["r-graft-gateway"]


def test_prometheus_knows_its_targets_by_the_names_of_the_rules_and_is_let_in(helm: Path) -> None:
    objects = render(helm, LAPTOP)
    monitors = {**of_kind(objects, "ServiceMonitor"), **of_kind(objects, "PodMonitor")}
    endpoints = {
        name: endpoint
        for name, one in monitors.items()
        for endpoint in one["spec"].get("endpoints", one["spec"].get("podMetricsEndpoints", []))
    }
    jobs = {rule["replacement"] for one in endpoints.values() for rule in one["relabelings"] if "replacement" in rule}
    config = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yaml").read_text())
    assert jobs == {scrape["job_name"] for scrape in config["scrape_configs"]}
    (orchestrator,) = [pod for pod in pods(objects) if pod.component == "orchestrator"]
    (port,) = orchestrator.containers[-1]["ports"]
    assert port["name"] == endpoints["r-graft-orchestrator"]["port"]
    settings = yaml.safe_load(of_kind(objects, "ConfigMap")["r-graft-orchestrator"]["data"]["graft.yaml"])
    assert settings["orchestrator"]["metrics_port"] == port["containerPort"]
    policies = of_kind(objects, "NetworkPolicy")
    monitoring = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    for part in ("gateway", "orchestrator", "training", "inference"):
        opened = [rule for rule in policies[f"r-graft-{part}"]["spec"]["ingress"] if monitoring in rule.get("from", [])]
        assert [rule["ports"] for rule in opened] == [[{"port": 8080, "protocol": "TCP"}]], part
    closed = render(helm, {"baseModel": "smollm2-135m", "networkPolicy": {"monitoringNamespace": None}})
    assert "ingress" not in of_kind(closed, "NetworkPolicy")["r-graft-orchestrator"]["spec"]


def test_the_bundled_database_is_reached_by_those_that_store(helm: Path) -> None:
    policies = of_kind(render(helm, LAPTOP), "NetworkPolicy")
    (rule,) = policies["r-graft-postgresql"]["spec"]["ingress"]
    assert {peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"] for peer in rule["from"]} == {
        "gateway",
        "orchestrator",
        "mlflow",
        "migrate",
    }
