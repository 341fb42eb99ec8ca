import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from graft.domain.errors import AlreadyExists, FailedPrecondition, GraftError, InvalidArgument, NotFound
from graft.registry.base_models import catalog_stamp, ensure_base_model, load_catalog
from graft.registry.catalog import Folder, entries, put
from graft.registry.facts import read_facts
from graft.registry.sources import make_once, source_text
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
    assert base.shape is not None
    assert base.shape.parameters == base.parameter_count
    assert base.size_bytes == (tiny / "model.safetensors").stat().st_size
    assert base in load_catalog(settings)
    assert base.source == "folder"
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


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("a: {folder: /x, licence: MIT}", r"base_models\.yaml: a\.licence: is unknown; a `folder` entry has derived, "),
        ("a: {folder: /x, hub: org/x}", r"a: needs exactly one of folder, package, hub, and has folder and hub"),
        ("a: {license: MIT}", r"a: needs exactly one of folder, package, hub"),
        ("a: {package: p}", r"a\.file: is required"),
        ("a: {hub: 'https://x/y/z'}", r"a\.hub: must be a repository such as org/name"),
        ("a: {folder: 3}", r"a\.folder: must be text, and is 3"),
        ("a: {folder: /x, derived: {from: b}}", r"a\.derived: needs `from`"),
        ("a: /x", r"a: expected keys"),
        ("A b: {folder: /x}", r"A b: 'A b' is not a name"),
        ("[a]", r"base_models\.yaml: expected a mapping"),
        ("a: {", r"base_models\.yaml is not YAML"),
        ("123: {folder: /x}", r"123: a name must be text: put it in quotes"),
        ("1.5: {folder: /x}\na: {folder: /x}", r"1\.5: a name must be text"),
        ("2026-01-02: {folder: /x}", r"2026-01-02: a name must be text"),
        ("2026-02-31: {folder: /x}", r"base_models\.yaml is not YAML"),
        ("a: {folder: /x}\na: {folder: /y}", r"'a' is there twice"),
        ("a: {folder: /x, folder: /y}", r"'folder' is there twice"),
        ("a: {hub: 1}\nb: {package: p}", r"a\.hub: must be text.*; b\.file: is required"),
    ],
)
def test_what_is_wrong_in_the_catalogue_is_told_with_file_entry_and_key(
    tmp_path: Path, written: str, told: str
) -> None:
    (tmp_path / "base_models.yaml").write_text(written)
    with pytest.raises(InvalidArgument, match=told) as caught:
        entries(load({"GRAFT_HOME": str(tmp_path)}))
    assert caught.value.reason == "INVALID_CATALOG"


def test_a_catalogue_that_is_no_text_is_told(tmp_path: Path) -> None:
    settings = load({"GRAFT_HOME": str(tmp_path)})
    own = tmp_path / "base_models.yaml"
    own.write_bytes("a: {folder: /modèles}".encode("latin-1"))
    with pytest.raises(InvalidArgument, match=r"base_models\.yaml is not UTF-8 text \(byte 16\)"):
        entries(settings)
    own.unlink()
    own.mkdir()
    with pytest.raises(InvalidArgument, match=r"base_models\.yaml cannot be read: Is a directory"):
        entries(settings)


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("config.json", '{"architectures": {"a": 1}}', "BASE_MODEL_CONFIG_INVALID"),
        ("config.json", '{"architectures": [1]}', "BASE_MODEL_CONFIG_INVALID"),
        ("graft-model.json", "{", "BASE_MODEL_LINEAGE_INVALID"),
        ("graft-model.json", "[]", "BASE_MODEL_LINEAGE_INVALID"),
    ],
)
def test_a_broken_file_of_one_folder_does_not_take_the_others_along(
    tiny: Path, tmp_path: Path, file: str, content: str, reason: str
) -> None:
    settings = load({"GRAFT_HOME": str(tmp_path)})
    folder = tmp_path / "broken"
    shutil.copytree(tiny, folder)
    (folder / file).write_text(content)
    put(settings, "broken", {"folder": str(folder)})
    faults: dict[str, GraftError] = {}
    load_catalog(settings, faults.__setitem__)
    assert {base: fault.reason for base, fault in faults.items()} == {"broken": reason}


def test_an_entry_that_is_added_leaves_comments_and_order_alone(tmp_path: Path) -> None:
    settings = load({"GRAFT_HOME": str(tmp_path)})
    own = tmp_path / "base_models.yaml"
    own.write_text("# Ours.\nz: {folder: /z}  # the last\ny: {folder: /y}")
    put(settings, "a", {"folder": "/a", "derived": {"from": "z", "layers": 2}})
    assert own.read_text().startswith("# Ours.\nz: {folder: /z}  # the last\ny: {folder: /y}\na:")
    assert entries(settings)["a"].source == Folder(Path("/a"), "z", 2)
    own.write_text("{z: {folder: /z}}")
    put(settings, "a", {"folder": "/a"})
    assert {"a", "z"} <= set(entries(settings))


def test_two_bases_whose_names_have_dots_do_not_share_a_lock(tmp_path: Path) -> None:
    def make(_: Path) -> None:
        # Waits for itself when the two share one.
        make_once(tmp_path / "qwen2.5-1", lambda _: None)

    make_once(tmp_path / "qwen2.5-7", make)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"qwen2.5-1", "qwen2.5-7"}


def test_an_entry_is_added_once_and_a_path_without_a_root_is_below_the_home(tmp_path: Path) -> None:
    settings = load({"GRAFT_HOME": str(tmp_path)})
    made = put(settings, "mine", {"folder": "base_models/mine", "derived": {"from": "smollm2-135m", "layers": 15}})
    assert made == entries(settings)["mine"]
    assert made.source == Folder(tmp_path / "base_models" / "mine", "smollm2-135m", 15)
    assert source_text(made) == "15 layers of smollm2-135m"
    put(settings, "theirs", {"hub": "org/name", "revision": "v1"})
    assert list(entries(settings)) == ["mine", "smollm2-135m", "theirs"]
    before = (tmp_path / "base_models.yaml").read_text()
    with pytest.raises(AlreadyExists, match="mine"):
        put(settings, "mine", {"folder": "/elsewhere"})
    with pytest.raises(InvalidArgument, match="needs exactly one"):
        put(settings, "other", {})
    assert (tmp_path / "base_models.yaml").read_text() == before


def test_a_model_of_the_hub_that_is_not_here_is_told_with_the_command(tmp_path: Path) -> None:
    settings = load({"GRAFT_HOME": str(tmp_path)})
    put(settings, "theirs", {"hub": "org/name"})
    with pytest.raises(FailedPrecondition, match="graft models pull theirs"):
        ensure_base_model(settings, "theirs")
    assert "theirs" not in {base.id for base in load_catalog(settings)}


def test_one_folder_at_fault_does_not_take_the_others_along(tiny: Path, tmp_path: Path) -> None:
    settings = load({"GRAFT_HOME": str(tmp_path)})
    put(settings, "gone", {"folder": str(tmp_path / "gone")})
    put(settings, "tiny", {"folder": str(tiny)})
    faults: dict[str, GraftError] = {}
    assert "tiny" in {base.id for base in load_catalog(settings, faults.__setitem__)}
    assert list(faults) == ["gone"]
    with pytest.raises(FailedPrecondition, match="gone"):
        load_catalog(settings)


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 269060552\n"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (lambda _: b"short", "is cut off, or no safetensors file"),
        (lambda _: LFS_POINTER, "is a Git-LFS pointer.*git lfs pull"),
        (lambda whole: whole[:-1], "bytes of tensors, and its header names"),
        (lambda whole: whole[:8] + b"[" + whole[9:], "has a damaged header"),
        (lambda _: b"\xff" * 16, "is cut off, or no safetensors file"),
    ],
)
def test_damaged_weights_are_told_and_do_not_take_the_others_along(
    tiny: Path, tmp_path: Path, content: Callable[[bytes], bytes], told: str
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tiny, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(content(weights.read_bytes()))
    settings = load({"GRAFT_HOME": str(tmp_path)})
    put(settings, "damaged", {"folder": str(folder)})
    with pytest.raises(FailedPrecondition, match=told) as caught:
        ensure_base_model(settings, "damaged")
    assert caught.value.reason == "BASE_MODEL_WEIGHTS_DAMAGED"
    faults: dict[str, GraftError] = {}
    load_catalog(settings, faults.__setitem__)
    assert list(faults) == ["damaged"]


def _without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _without_a_shard(folder: Path) -> None:
    names = {f"layer.{number}": f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}
    (folder / "model.safetensors").rename(folder / names["layer.1"])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def _with_a_link_to_nothing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "blobs" / "0a1b")


def _with_a_broken_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("[]")


def _quantized(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))


@pytest.mark.parametrize(
    ("spoil", "reason", "told"),
    [
        (_without_tokenizer, "BASE_MODEL_TOKENIZER_MISSING", r"no tokenizer \(tokenizer\.json or"),
        (_without_a_shard, "BASE_MODEL_WEIGHTS_MISSING", r"lacks 1 of the 2 .*: model-00002-of-00002\.safetensors\. F"),
        (_with_a_link_to_nothing, "BASE_MODEL_UNREADABLE", r"model\.safetensors cannot be used \(No such file"),
        (_with_a_broken_index, "BASE_MODEL_WEIGHTS_DAMAGED", r"index\.json cannot be read"),
        (_quantized, "BASE_MODEL_QUANTIZED", r"is quantized"),
    ],
)
def test_a_folder_that_no_job_could_use_is_refused(
    tiny: Path, tmp_path: Path, spoil: Callable[[Path], None], reason: str, told: str
) -> None:
    folder = tmp_path / "spoiled"
    shutil.copytree(tiny, folder)
    read_facts("it", folder, tmp_path)
    spoil(folder)
    with pytest.raises(FailedPrecondition, match=told) as caught:
        read_facts("it", folder, tmp_path)
    assert caught.value.reason == reason


def test_a_file_that_is_given_is_read_and_never_written(tmp_path: Path) -> None:
    settings = load({"GRAFT_HOME": str(tmp_path)})
    given = tmp_path / "catalog.yaml"
    given.write_text("a: {folder: base}\nb: {folder: /b}\n")
    (tmp_path / "base_models.yaml").write_text("b: {folder: /ours}\n")
    put(settings, "c", {"folder": "/c"})
    found = entries(settings)
    assert [found[base].source for base in "abc"] == [
        Folder(tmp_path / "base"),
        Folder(Path("/ours")),
        Folder(Path("/c")),
    ]
    with pytest.raises(AlreadyExists):
        put(settings, "a", {"folder": "/other"})
    assert given.read_text() == "a: {folder: base}\nb: {folder: /b}\n"
    before = catalog_stamp(settings)
    given.unlink()
    assert catalog_stamp(settings) != before
    given.write_text("a: 1")
    with pytest.raises(InvalidArgument, match=r"catalog\.yaml: a: "):
        entries(settings)
