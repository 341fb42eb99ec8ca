"""What Kubernetes, KubeRay, Gateway API and Prometheus' operator would refuse: strict schemas, without a cluster.

KubeRay's definitions are test data beside the repository (`../shared/k8s`), or in the archive that GRAFT_TEST_KUBERAY
names. Those of the last two are in npm's packages, as code: `deploy/setup/definitions` installs them, `definitions.mjs`
asks them.
"""

import functools
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.support.chart import ROOT, Object

VERSIONS = tuple(f"1.{minor}" for minor in range(29, 38))
KUBERAY = {"RayCluster": "rayclusters", "RayService": "rayservices"}
ELSEWHERE = ("gateway.networking.k8s.io", "monitoring.coreos.com")
"""Groups that are no part of Kubernetes, nor of KubeRay."""
DEFINITIONS = ROOT / "build" / "definitions"


def kuberay_archive() -> Path:
    """The definitions. Skips the test, saying so, where they are not."""
    path = Path(os.environ.get("GRAFT_TEST_KUBERAY") or ROOT.parent / "shared" / "k8s" / "kuberay-crds-v1.7.0.txz")
    if not path.is_file():
        pytest.skip(f"KubeRay's definitions are not at {path}: set GRAFT_TEST_KUBERAY to the archive.")
    return path


@functools.cache
def _kuberay(archive: Path, kind: str) -> jsonschema.Draft7Validator:
    with tarfile.open(archive) as files:
        file = files.extractfile(f"v1.7.0/ray.io_{KUBERAY[kind]}.yaml")
        assert file is not None
        definition = yaml.load(file, yaml.CSafeLoader)
    (schema,) = [
        version["schema"]["openAPIV3Schema"] for version in definition["spec"]["versions"] if version["name"] == "v1"
    ]
    _make_strict(schema)
    schema["properties"]["metadata"] = {}
    return jsonschema.Draft7Validator(schema)


def _make_strict(node: Any) -> None:
    """Unknown fields are faults, which a cluster drops in silence."""
    if isinstance(node, list):
        for item in node:
            _make_strict(item)
    if not isinstance(node, dict):
        return
    if (
        isinstance(node.get("properties"), dict)
        and "additionalProperties" not in node
        and not node.get("x-kubernetes-preserve-unknown-fields")
    ):
        node["additionalProperties"] = False
    if node.get("x-kubernetes-int-or-string"):
        node.pop("type", None)
    for value in list(node.values()):
        _make_strict(value)


def kuberay_faults(archive: Path, one: Object) -> list[str]:
    """What KubeRay's definition says against an object."""
    return [
        f"{one['kind']} {'.'.join(map(str, error.absolute_path))}: {error.message}"
        for error in _kuberay(archive, one["kind"]).iter_errors(one)
    ]


def elsewhere_faults(objects: list[Object]) -> list[str]:
    """What the definitions of ELSEWHERE say against their objects. Skips the test, saying so, without them."""
    node = shutil.which("node")
    if node is None or not (DEFINITIONS / "done").is_file():
        pytest.skip("Definitions of Gateway API and Prometheus are not here: deploy/setup/definitions installs them.")
    told = subprocess.run(
        [node, ROOT / "tests" / "support" / "definitions.mjs", DEFINITIONS],
        input=json.dumps([one for one in objects if one["apiVersion"].partition("/")[0] in ELSEWHERE]),
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stderr
    faults: list[str] = json.loads(told.stdout)
    return faults


@functools.cache
def _kubernetes() -> Any:
    import kubernetes_validate
    from kubernetes_validate import utils

    # It reads some megabytes of definitions anew for each object.
    utils.schema_contents = functools.cache(utils.schema_contents)
    return kubernetes_validate


def kubernetes_faults(one: Object, version: str) -> list[str]:
    """What a version of Kubernetes says against an object of its own kinds."""
    validator = _kubernetes()
    if one["apiVersion"].partition("/")[0] in (*ELSEWHERE, "ray.io"):
        return []
    try:
        validator.validate(one, version, strict=True)
    except validator.ValidationError as error:
        return [f"{version} {one['kind']} {one['metadata']['name']}: {error.message}"]
    return []
