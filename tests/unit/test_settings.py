from pathlib import Path

import pytest

from graft import settings
from graft.domain.errors import InvalidArgument


def test_a_variable_wins_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "graft.yaml").write_text("gateway: {http_port: 1234, grpc_port: 1235}\n")
    loaded = settings.load({"GRAFT_HOME": str(tmp_path), "GRAFT_GATEWAY_HTTP_PORT": "4321"})
    assert (loaded.gateway.http_port, loaded.gateway.grpc_port) == (4321, 1235)


def test_what_depends_on_the_home_and_the_ports_is_filled_in(tmp_path: Path) -> None:
    loaded = settings.load({"GRAFT_HOME": str(tmp_path), "GRAFT_REGISTRY_PORT": "5001"})
    assert loaded.store_url == f"sqlite+aiosqlite:///{tmp_path}/graft.db"
    assert loaded.tracking_uri == "http://127.0.0.1:5001"
    assert loaded.home.cache == tmp_path / "cache"


def test_an_unknown_variable_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="Did you mean GRAFT_GATEWAY_HTTP_PORT"):
        settings.load({"GRAFT_HOME": str(tmp_path), "GRAFT_GATEWAY_HTP_PORT": "1"})


def test_unknown_keys_and_mistyped_values_of_the_file_are_all_told(tmp_path: Path) -> None:
    (tmp_path / "graft.yaml").write_text("gateway: {nope: 1}\nserving: {max_loras: none}\n")
    with pytest.raises(InvalidArgument) as caught:
        settings.load({"GRAFT_HOME": str(tmp_path)})
    assert "gateway.nope" in caught.value.message
    assert "serving.max_loras" in caught.value.message


def test_a_named_file_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"nowhere\.yaml"):
        settings.load({"GRAFT_HOME": str(tmp_path), "GRAFT_CONFIG": str(tmp_path / "nowhere.yaml")})
