"""A full model becomes a base model of the catalogue once, whoever else is at it, and never another's folder."""

from collections.abc import Callable
from pathlib import Path

import pytest

from graft.domain.errors import AlreadyExists
from graft.registry import catalog, full_models
from graft.registry.full_models import adopt
from graft.registry.sources import make_once
from graft.settings import Settings, load


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load({"GRAFT_HOME": str(tmp_path / "home")})


def _pulled(folder: Path, weights: bytes) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def _adopt(settings: Settings, pulled: Path, model: str = "tiny:full@2") -> Path:
    return adopt(settings, "mine", "default", model, "MIT", pulled)


def test_of_two_processes_that_adopt_one_model_at_once_neither_fails(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pulled = _pulled(tmp_path / "pulled", b"weights")

    def slower(target: Path, make: Callable[[Path], None]) -> Path:
        monkeypatch.setattr(full_models, "make_once", make_once)
        _adopt(settings, pulled)  # the other process is through before this one goes on
        return make_once(target, make)

    monkeypatch.setattr(full_models, "make_once", slower)
    folder = _adopt(settings, pulled)
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert catalog.entry(settings, "mine").source.origin == "full model tiny:full@2 of project default"  # type: ignore[union-attr]


def test_of_two_models_that_want_one_name_at_once_the_second_is_refused(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = _pulled(tmp_path / "first", b"weights"), _pulled(tmp_path / "second", b"others")

    def slower(target: Path, make: Callable[[Path], None]) -> Path:
        monkeypatch.setattr(full_models, "make_once", make_once)
        _adopt(settings, first)
        return make_once(target, make)

    monkeypatch.setattr(full_models, "make_once", slower)
    with pytest.raises(AlreadyExists, match="another name"):
        _adopt(settings, second, "tiny:full@3")


def test_a_folder_that_a_killed_process_left_is_used_for_its_own_model_alone(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = _pulled(tmp_path / "first", b"weights"), _pulled(tmp_path / "second", b"others")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(catalog, "put", killed)
        with pytest.raises(KeyboardInterrupt):
            _adopt(settings, first)
    with pytest.raises(AlreadyExists, match="holds another model"):
        _adopt(settings, second, "tiny:full@3")
    copied = _pulled(tmp_path / "copied", b"weights")  # pulled once more
    assert (_adopt(settings, copied) / "model.safetensors").read_bytes() == b"weights"
