"""What the settings place elsewhere: what then still starts here, and what is refused before anything does."""

from pathlib import Path

import pytest

from graft.domain.errors import FailedPrecondition, InvalidArgument
from graft.settings import Settings, load
from graft.stack import preflight
from graft.stack.backends import check_backends
from graft.stack.machine import State
from graft.stack.processes import described
from tests.support.command import ended, started
from tests.support.ports import free_port


def _settings(tmp_path: Path, **variables: str) -> Settings:
    return load({"GRAFT_HOME": str(tmp_path), **{f"GRAFT_{name}": value for name, value in variables.items()}})


def test_everything_starts_here_when_nothing_is_placed_elsewhere(tmp_path: Path) -> None:
    names = [process.name for process in described(_settings(tmp_path), {})]
    assert names == ["ray", "mlflow", "gateway", "inference", "orchestrator"]


@pytest.mark.parametrize(
    ("variables", "absent"),
    [
        ({"REGISTRY_TRACKING_URI": "http://mlflow:5000"}, {"mlflow"}),
        ({"SERVING_ADDRESS": "engine:9000"}, {"inference"}),
        ({"ORCHESTRATOR_RAY_ADDRESS": "head:6379"}, {"ray"}),
        (
            {"ORCHESTRATOR_RAY_ADDRESS": "ray://head:10001", "SERVING_ADDRESS": "head:9000"}
            | {"REGISTRY_TRACKING_URI": "http://mlflow:5000"},
            {"ray", "inference", "mlflow"},
        ),
    ],
)
def test_what_is_given_by_address_does_not_start_and_is_not_waited_for(
    variables: dict[str, str], absent: set[str]
) -> None:
    settings = _settings(Path("/srv/graft"), **variables)
    preflight.check(settings)
    processes = described(settings, {})
    assert {process.name for process in processes} == {"ray", "mlflow", "gateway", "inference", "orchestrator"} - absent
    assert absent.isdisjoint(name for process in processes for name in process.after)


def test_a_cluster_that_is_reached_by_client_needs_the_address_of_its_inference_service(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match=r"serving\.address") as caught:
        preflight.check(_settings(tmp_path, ORCHESTRATOR_RAY_ADDRESS="ray://head:10001"))
    assert caught.value.reason == "SERVING_ADDRESS_MISSING"


def test_a_storage_that_is_no_url_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="s3://bucket/prefix"):
        _settings(tmp_path, STORAGE_URL="/mnt/shared")


def test_the_doctor_says_of_each_backend_that_it_does_not_answer_and_what_to_look_at(tmp_path: Path) -> None:
    port = free_port()
    settings = _settings(
        tmp_path,
        STORE_URL=f"postgresql+psycopg://graft:secret@127.0.0.1:{port}/graft",
        REGISTRY_TRACKING_URI=f"http://127.0.0.1:{port}",
        SERVING_ADDRESS=f"127.0.0.1:{port}",
        STORAGE_URL=f"file://{tmp_path}/shared",
    )
    checks = {check.name: check for check in check_backends(settings)}
    assert checks["storage"].state is State.OK
    assert not [path for path in (tmp_path / "shared").rglob("*") if path.is_file()]
    for name, setting in {
        "database": "GRAFT_STORE_URL",
        "mlflow": "GRAFT_REGISTRY_TRACKING_URI",
        "inference": "GRAFT_SERVING_ADDRESS",
    }.items():
        assert checks[name].state is State.FAIL
        assert str(port) in checks[name].message
        assert setting in checks[name].fix
    assert "secret" not in checks["database"].message


async def test_a_settings_file_can_be_named_to_the_doctor_and_its_faults_are_told(tmp_path: Path) -> None:
    config = tmp_path / "cluster.yaml"
    config.write_text("storage: {url: s3//bucket}\n")
    ran = await ended(await started("doctor", "--json", "--config", str(config), GRAFT_HOME=str(tmp_path)))
    assert ran.code == 1
    told = {check["name"]: check for check in ran.json["checks"]}
    assert told["settings"]["state"] == "fail"
    assert str(config) in told["settings"]["message"]
    assert "s3://bucket/prefix" in told["settings"]["message"]
