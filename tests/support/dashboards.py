"""What Prometheus' rules and Grafana's dashboard ask for: every expression, and the names of metrics in it."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "helm" / "graft" / "files" / "prometheus-rules.yaml"
DASHBOARD = ROOT / "helm" / "graft" / "files" / "grafana-dashboard.json"

MADE_BY_PROMETHEUS = {"up"}
_NO_NAME = re.compile(
    r'"(?:\\.|[^"\\])*"'  # strings
    r"|\{[^}]*\}|\[[^\]]*\]"  # matchers and ranges
    r"|\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)"  # lists of labels
)
_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*\b(?!\s*\()")
_WORDS = {"and", "or", "unless", "bool", "offset"}


def names_in(expression: str) -> set[str]:
    """Names of the metrics in a PromQL expression.

    Functions are followed by a parenthesis, which no metric is.
    """
    bare = _NO_NAME.sub(" ", re.sub(r'"(?:\\.|[^"\\])*"', " ", expression))
    # Aggregations may have their labels before the parenthesis, which are gone by now: `sum  (…)`.
    return {name for name in _NAME.findall(bare) if name not in _WORDS}


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    """Panels that show something; rows only order them."""
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def expressions() -> Iterator[str]:
    yield from (rule["expr"] for rule in rules())
    yield from (target["expr"] for panel in panels() for target in panel["targets"])


def metric_names() -> set[str]:
    """Of every rule and panel: what some process has to export. What rules record themselves is left out."""
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    return {name for each in expressions() for name in names_in(each)} - recorded - MADE_BY_PROMETHEUS
