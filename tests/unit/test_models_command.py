"""`graft models` on this home's catalogue: what needs no stack."""

from pathlib import Path

import pytest

from tests.support.command import graft
from tests.support.tiny_llama import make_tiny_llama


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("deep"), layers=4)


async def test_a_folder_is_added_listed_and_shown(deep: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    added = await graft("models", "add", "deep", deep, "--license", "MIT", GRAFT_HOME=home)
    assert added.out == f"deep is in {home}/base_models.yaml.\n"
    again = await graft("models", "add", "deep", deep, GRAFT_HOME=home)
    assert (again.code, "already" in again.err) == (1, True)
    hub = await graft("models", "add", "far", "hub:org/name", GRAFT_HOME=home)
    assert "graft models pull far" in hub.out
    wrong = await graft("models", "add", "wrong", tmp_path, "--json", GRAFT_HOME=home)
    assert (wrong.code, wrong.error["reason"]) == (2, "BASE_MODEL_CONFIG_INVALID")
    listed = await graft("models", "list", "--local", "--json", GRAFT_HOME=home)
    assert {one["name"]: one["state"] for one in listed.json if one["name"] != "smollm2-135m"} == {
        "deep": "ready",
        "far": "not pulled",
    }
    shown = await graft("models", "show", "deep", GRAFT_HOME=home)
    assert "license          MIT" in shown.out
    unknown = await graft("models", "show", "nope", GRAFT_HOME=home)
    assert (unknown.code, "deep" in unknown.err) == (3, True)
