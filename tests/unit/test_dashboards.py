"""Rules and dashboard ask only for what is there: metrics of a gateway here, of an orchestrator and Ray elsewhere."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from graft.gateway.metrics import REQUEST_SECONDS, REQUESTS
from graft.orchestrator.metrics import EVALUATIONS, JOB_MOVES, JOBS
from tests.support.dashboards import DASHBOARD, ROOT, RULES, expressions, metric_names, names_in, panels, rules
from tests.support.http_gateways import http_gateway

PROMETHEUS = ROOT / "deploy" / "prometheus"


def test_names_are_told_from_functions_labels_and_words() -> None:
    expression = 'sum by (a, le) (rate(x_total{job="y", code=~"A{2}|B"}[5m])) / on (ip) z:w > bool 0.5 or vector(0)'
    assert names_in(expression) == {"x_total", "z:w"}


async def test_a_gateway_exports_each_metric_that_is_asked_of_it(tmp_path: Path) -> None:
    async with http_gateway(tmp_path) as it:
        await it.raw.get("/v1/models")
        page = (await it.raw.get("/metrics")).text
    exported = {line.split("{")[0].split(" ")[0] for line in page.splitlines() if not line.startswith("#")}
    # An orchestrator's and Ray's are asked of them: test_orchestrator_metrics.py, test_serve_deploy.py.
    wanted = {name for name in metric_names() if not name.startswith(("ray_", "graft_orchestrator_"))}
    assert "graft_gateway_requests_total" in wanted
    assert wanted - exported == set()


def test_rules_and_dashboard_group_grafts_metrics_by_labels_that_they_have() -> None:
    measured = [REQUESTS, REQUEST_SECONDS, JOBS, EVALUATIONS, JOB_MOVES]
    known = {"le", *(label for metric in measured for label in metric._labelnames)}
    asked = set()
    for expression in expressions():
        if "graft" in expression:
            asked |= {
                label.strip() for labels in re.findall(r"by \(([^)]*)\)", expression) for label in labels.split(",")
            }
    assert asked
    assert asked <= known


async def test_refusals_are_counted_under_the_codes_that_rules_ask_for(tmp_path: Path) -> None:
    async with http_gateway(tmp_path, engine_address="127.0.0.1:9") as it:
        refused = await it.raw.post("/v1/completions", json={"model": "smollm2-135m", "prompt": "hi"})
        page = (await it.raw.get("/metrics")).text
    assert refused.status_code == 503
    (rule,) = (rule for rule in rules() if rule.get("record") == "graft:gateway_unavailable:ratio_rate5m")
    (codes,) = re.findall(r'code=~"([^"]*)"', rule["expr"])
    counted = re.findall(
        r'graft_gateway_requests_total\{code="(\w+)",method="[^"]*completions[^"]*",protocol="http"\}', page
    )
    assert any(re.fullmatch(codes, code) for code in counted)


def test_every_alert_says_what_it_is_and_what_to_do() -> None:
    alerts = [rule for rule in rules() if "alert" in rule]
    assert alerts
    for alert in alerts:
        assert alert["labels"]["severity"] in {"critical", "warning"}, alert["alert"]
        assert len(alert["annotations"]["summary"]) < len(alert["annotations"]["description"]), alert["alert"]
        assert alert["for"], alert["alert"]


def test_every_alert_is_rung_by_a_test_of_promtool() -> None:
    tests = yaml.safe_load((PROMETHEUS / "rules.test.yaml").read_text())["tests"]
    rung = {each["alertname"] for test in tests for each in test["alert_rule_test"] if each["exp_alerts"]}
    assert rung == {rule["alert"] for rule in rules() if "alert" in rule}


def test_panels_have_a_description_and_a_unit_and_do_not_lie_on_each_other() -> None:
    everything = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    taken: set[tuple[int, int]] = set()
    for panel in everything:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    assert all(panel["description"] and panel["fieldConfig"]["defaults"]["unit"] for panel in panels())


def test_prometheus_reads_the_rules_of_the_chart_under_the_jobs_that_they_name() -> None:
    config = yaml.safe_load((PROMETHEUS / "prometheus.yaml").read_text())
    assert [(PROMETHEUS / file).resolve() for file in config["rule_files"]] == [RULES]
    jobs = {scrape["job_name"] for scrape in config["scrape_configs"]}
    asked = {job for expression in expressions() for job in re.findall(r'job="([^"]*)"', expression)}
    assert asked <= jobs == {"graft-gateway", "graft-orchestrator", "graft-ray"}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
def test_promtool_accepts_configuration_and_rules_and_alerts_ring_when_they_should(tmp_path: Path) -> None:
    copy = tmp_path / "deploy" / "prometheus"
    shutil.copytree(PROMETHEUS, copy)
    (copy / "ray-token").touch()
    shutil.copytree(RULES.parent, tmp_path / "helm" / "graft" / "files")
    asked = [{"record": f"panel:{index}", "expr": each} for index, each in enumerate(expressions())]
    (copy / "panels.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": asked}]}))
    for command in (
        ["check", "config", "prometheus.yaml"],
        ["check", "rules", "panels.yaml"],
        ["test", "rules", "rules.test.yaml"],
    ):
        done = subprocess.run(
            ["promtool", *command], cwd=copy, capture_output=True, text=True, timeout=60, env=os.environ
        )
        assert done.returncode == 0, done.stdout + done.stderr
