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
    assert "licence          MIT" in shown.out
    unknown = await graft("models", "show", "nope", GRAFT_HOME=home)
    assert (unknown.code, "deep" in unknown.err) == (3, True)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "`graft models add it hub:HuggingFaceTB/SmolLM2-135M`"),
        ("https://huggingface.co/org/name", "`graft models add it hub:org/name`"),
        ("https://huggingface.co/org/name/tree/v1.0", "`graft models add it hub:org/name --revision v1.0`"),
        ("/no/such/folder", "/no/such/folder is no folder. Give a folder in safetensors, or hub:ORG/NAME."),
    ],
)
async def test_a_source_that_is_no_folder_is_told_with_what_was_meant(source: str, told: str, tmp_path: Path) -> None:
    ran = await graft("models", "add", "it", source, GRAFT_HOME=tmp_path)
    assert (ran.code, told in ran.err) == (2, True), ran.err


async def test_a_name_that_cannot_be_is_told_before_the_folder_is_read(deep: Path, tmp_path: Path) -> None:
    wrong = await graft("models", "add", "A b", deep, GRAFT_HOME=tmp_path)
    taken = await graft("models", "add", "smollm2-135m", deep, GRAFT_HOME=tmp_path)
    assert ("'A b' is not a name" in wrong.err, "already" in taken.err) == (True, True)
    assert list(tmp_path.rglob("*-facts.json")) == []


async def test_the_list_says_why_a_model_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "base_models.yaml").write_text("gone: {folder: /no/such/folder}\n")
    listed = await graft("models", "list", "--local", GRAFT_HOME=tmp_path)
    assert "unusable" in listed.out
    assert "'gone': /no/such/folder holds no config.json" in listed.err
