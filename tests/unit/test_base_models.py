from pathlib import Path

import pytest
import yaml

from graft.domain.errors import FailedPrecondition, NotFound
from graft.registry.base_models import ensure_base_model, load_catalog
from graft.settings import load
from tests.support.tiny_llama import make_tiny_llama


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))


def test_a_folder_in_the_home_s_catalogue_is_described_and_its_digest_follows_its_files(
    tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "base_models.yaml").write_text(yaml.safe_dump({"tiny": {"folder": str(tiny), "license": "MIT"}}))
    settings = load({"GRAFT_HOME": str(tmp_path)})
    base = ensure_base_model(settings, "tiny")
    assert (base.id, base.license, base.path) == ("tiny", "MIT", str(tiny))
    assert base.context_tokens == 512
    assert 300_000 < base.parameter_count < 500_000
    assert base.size_bytes == (tiny / "model.safetensors").stat().st_size
    assert base in load_catalog(settings)
    config = tiny / "config.json"
    config.write_text(config.read_text() + "\n")
    assert ensure_base_model(settings, "tiny").digest != base.digest


def test_an_unknown_base_model_is_told_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"nope.*smollm2-135m"):
        ensure_base_model(load({"GRAFT_HOME": str(tmp_path)}), "nope")


def test_a_missing_package_is_one_sentence_with_the_fix(tmp_path: Path) -> None:
    entry = {"package": "no-such-package", "file": "x.gguf"}
    (tmp_path / "base_models.yaml").write_text(yaml.safe_dump({"absent": entry}))
    with pytest.raises(FailedPrecondition, match="make setup"):
        ensure_base_model(load({"GRAFT_HOME": str(tmp_path)}), "absent")


def test_an_architecture_with_other_layers_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    (tmp_path / "base_models.yaml").write_text(yaml.safe_dump({"other": {"folder": str(folder)}}))
    with pytest.raises(FailedPrecondition, match="GPT2LMHeadModel"):
        ensure_base_model(load({"GRAFT_HOME": str(tmp_path)}), "other")
