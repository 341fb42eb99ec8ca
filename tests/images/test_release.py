"""`helm test`, and what the pods may do, on the release that runs in the images. Takes root, buildah and mmdebstrap."""

import pytest

from tests.images.conftest import RELEASE, Release
from tests.support.pods import Pod
from tests.support.policies import reaches

# Bases from Debian's archive, and four gigabytes of packages; then everything on two cores.
pytestmark = [pytest.mark.integration, pytest.mark.timeout(5400)]
PODS = ("mlflow", "trainhead", "enginehead", "trainer", "engine", "leader", "gateway")
WRITE = "import pathlib, sys; pathlib.Path(sys.argv[1], 'written').write_text('x')"


def test_helm_test_trains_an_adapter_and_asks_it(release: Release) -> None:
    told = release.pods["test"].run(1500)
    print(told)
    assert "smollm2-135m:helm-test@1 answers" in told


@pytest.fixture(params=PODS)
def pod(request: pytest.FixtureRequest, release: Release) -> Pod:
    """Each in turn."""
    return release.pods[request.param]


def test_a_pod_is_nobody_and_can_gain_nothing(pod: Pod) -> None:
    told = pod.execute(["python3", "-c", "print(open('/proc/1/status').read())"]).stdout
    status = dict(line.split(":\t", 1) for line in told.splitlines() if ":\t" in line)
    assert status["Uid"].split() == ["65532"] * 4
    assert status["NoNewPrivs"] == "1"
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0


def test_a_pod_writes_to_its_volumes_and_nowhere_else(pod: Pod) -> None:
    assert pod.execute(["python3", "-c", WRITE, "/tmp"]).returncode == 0
    for place in ("/etc", "/opt/graft", "/usr"):
        assert "Read-only file system" in pod.execute(["python3", "-c", WRITE, place]).stderr


@pytest.mark.parametrize(
    ("source", "target", "port"),
    [
        ("test", "mlflow", 5000),
        ("test", "engine", 9000),
        ("gateway", "mlflow", 5000),
        ("gateway", "trainhead", 10001),
        ("leader", "trainhead", 8265),
        ("leader", "gateway", 8080),
        ("trainer", "gateway", 8080),
        ("trainer", "store", 5432),
        ("engine", "trainhead", 6379),
        ("engine", "store", 5432),
        ("mlflow", "engine", 9000),
    ],
)
def test_a_pod_does_not_reach_what_no_arrow_leads_to(release: Release, source: str, target: str, port: int) -> None:
    hosts = {"store": release.store, **{name: pod.host for name, pod in release.pods.items()}}
    assert reaches(hosts[target], hosts[target], port)  # something listens there
    assert not reaches(hosts[source], hosts[target], port)


def test_every_pod_still_runs(release: Release) -> None:
    assert [
        name for name in PODS if (process := release.pods[name].process) is None or process.poll() is not None
    ] == []


def test_whoever_has_another_token_does_not_reach_ray(release: Release) -> None:
    ask = ["ray", "list", "nodes", "--address", f"http://{RELEASE}-training-head-svc:8265"]
    pod = release.pods["trainer"]
    assert pod.execute(ask).returncode == 0
    assert pod.execute(["env", "RAY_AUTH_TOKEN=" + "x" * 48, *ask]).returncode != 0


def test_gateways_and_orchestrators_end_with_success_when_told_to(release: Release) -> None:
    """As the last of them: nothing runs afterwards."""
    assert release.pods["gateway"].stop() == 0
    assert release.pods["leader"].stop() == 0
