"""Every way in which an adapter folder can be wrong is found before the engine sees it, and told by file and fault."""

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graft.domain.errors import FailedPrecondition
from graft.registry.digest import adapter_digest
from graft.serving.prove import BaseShapes, base_shapes, prove, read_header

from ..support.adapters import tiny_base

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"
BASE = BaseShapes("tiny", "sha256:base", {Q: (8, 16), DOWN: (16, 32)})
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def write_safetensors(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str = "F32", width: int = 4) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + width * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"\1" * end)


def shapes(rank: int = 4) -> dict[str, tuple[int, ...]]:
    return {
        f"base_model.model.{Q}.lora_A.weight": (rank, 16),
        f"base_model.model.{Q}.lora_B.weight": (8, rank),
        f"base_model.model.{DOWN}.lora_A.weight": (rank, 32),
        f"base_model.model.{DOWN}.lora_B.weight": (16, rank),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_safetensors(tmp_path / WEIGHTS, shapes())
    (tmp_path / CONFIG).write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "target_modules": ["q_proj"]})
    )
    return tmp_path


def check(folder: Path, *, expected_digest: str | None = None, max_lora_rank: int = 16) -> None:
    prove(
        folder,
        BASE,
        model="tiny:a@1",
        max_lora_rank=max_lora_rank,
        expected_digest=expected_digest or (adapter_digest(folder) if (folder / WEIGHTS).is_file() else "sha256:0"),
    )


def configure(folder: Path, **fields: object) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def assert_refused(folder: Path, file: str, fault: str, **options: Any) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        check(folder, **options)
    assert caught.value.reason == "ADAPTER_INVALID"
    assert caught.value.metadata["file"] == file
    assert fault in caught.value.metadata["fault"]
    assert caught.value.message.startswith(f"Adapter tiny:a@1 cannot be served: {file}: ")
    assert str(folder) not in caught.value.message


def test_a_whole_adapter_is_proven(folder: Path) -> None:
    check(folder)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    digest = adapter_digest(folder)
    (folder / name).unlink()
    assert_refused(folder, name, "is missing", expected_digest=digest)


@pytest.mark.parametrize("kept", [0, 5, 8, 40, -1, -100])
def test_a_file_cut_anywhere_is_truncated(folder: Path, kept: int) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:kept])
    assert_refused(folder, WEIGHTS, "truncated")


def test_bytes_after_the_last_tensor_are_refused(folder: Path) -> None:
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"more")
    assert_refused(folder, WEIGHTS, "after its last tensor")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"\xff" * 64, "out of bounds"),
        (struct.pack("<Q", 8) + b"not json", "cannot be read"),
        (struct.pack("<Q", 2) + b"[]", "cannot be read"),
        (struct.pack("<Q", 10) + b'{"a": {}} ', "cannot be read"),
    ],
)
def test_what_is_not_safetensors_is_refused(folder: Path, content: bytes, fault: str) -> None:
    (folder / WEIGHTS).write_bytes(content)
    assert_refused(folder, WEIGHTS, fault)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]},
    ],
)
def test_tensors_that_do_not_lie_where_their_shape_says_are_refused(folder: Path, entry: dict[str, object]) -> None:
    raw = json.dumps({"a": entry}).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(raw)) + raw + b"\0" * 12)
    assert_refused(folder, WEIGHTS, "does not lie")


def test_an_unknown_tensor_type_is_refused(folder: Path) -> None:
    write_safetensors(folder / WEIGHTS, shapes(), dtype="F31")
    assert_refused(folder, WEIGHTS, "unknown type F31")


@pytest.mark.parametrize(("dtype", "width"), [("I32", 4), ("F64", 8)])
def test_a_type_that_no_adapter_has_is_refused(folder: Path, dtype: str, width: int) -> None:
    write_safetensors(folder / WEIGHTS, shapes(), dtype=dtype, width=width)
    assert_refused(folder, WEIGHTS, f"has type {dtype}")


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"init_lora_weights": "pissa"}, "changes the base model's weights"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base model's weights"),
        ({"init_lora_weights": "olora"}, "changes the base model's weights"),
        ({"r": 0}, "not a positive integer"),
        ({"r": True}, "not a positive integer"),
        ({"r": "8"}, "not a positive integer"),
        ({"r": 17}, "above the service's max_lora_rank of 16"),
        ({"rank_pattern": {"q_proj": 32}}, "q_proj: rank 32 is above the service's"),
        ({"rank_pattern": [1]}, "rank_pattern is not an object"),
        ({"rank_pattern": {"(": 4}}, "not a regular expression"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'"),
    ],
)
def test_a_configuration_that_the_engine_cannot_serve_is_refused(
    folder: Path, fields: dict[str, object], fault: str
) -> None:
    configure(folder, **fields)
    assert_refused(folder, CONFIG, fault)


@pytest.mark.parametrize("initialisation", [True, False, "gaussian"])
def test_initialisations_that_leave_the_base_alone_are_served(folder: Path, initialisation: object) -> None:
    configure(folder, init_lora_weights=initialisation)
    check(folder)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe"])
def test_a_configuration_that_is_not_an_object_is_refused(folder: Path, content: bytes) -> None:
    (folder / CONFIG).write_bytes(content)
    assert_refused(folder, CONFIG, "JSON")


def test_a_rank_that_differs_from_the_configuration_is_refused(folder: Path) -> None:
    write_safetensors(folder / WEIGHTS, shapes(rank=2))
    assert_refused(folder, WEIGHTS, "with rank 4 needs [4, 16]")


def test_ranks_by_pattern_are_compared_module_by_module(folder: Path) -> None:
    configure(folder, rank_pattern={"down_proj": 2})
    assert_refused(folder, WEIGHTS, "with rank 2 needs")
    narrow = {name: shape for name, shape in shapes().items() if Q in name}
    write_safetensors(folder / WEIGHTS, {**narrow, **{n: s for n, s in shapes(rank=2).items() if DOWN in n}})
    check(folder)


def test_a_shape_of_another_base_is_refused(folder: Path) -> None:
    write_safetensors(folder / WEIGHTS, shapes() | {f"base_model.model.{Q}.lora_B.weight": (9, 4)})
    assert_refused(folder, WEIGHTS, "has shape [9, 4]; tiny with rank 4 needs [8, 4]")


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight", "no such layer"),
        ("base_model.model.lm_head.lora_A.weight", "no such layer"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", "not a tensor of a LoRA adapter"),
        ("base_model.model.score.weight", "not a tensor of a LoRA adapter"),
        (f"base_model.model.{Q}.lora_magnitude_vector", "not a tensor of a LoRA adapter"),
    ],
)
def test_a_tensor_that_the_base_has_no_place_for_is_refused(folder: Path, name: str, fault: str) -> None:
    write_safetensors(folder / WEIGHTS, shapes() | {name: (4, 16)})
    assert_refused(folder, WEIGHTS, fault)


def test_half_a_layer_is_refused(folder: Path) -> None:
    halves = shapes()
    del halves[f"base_model.model.{Q}.lora_B.weight"]
    write_safetensors(folder / WEIGHTS, halves)
    assert_refused(folder, WEIGHTS, f"{Q} has lora_A only")


def test_an_adapter_without_tensors_is_refused(folder: Path) -> None:
    write_safetensors(folder / WEIGHTS, {})
    assert_refused(folder, WEIGHTS, "holds no tensors")


def test_changed_bytes_are_found_by_the_digest(folder: Path) -> None:
    digest = adapter_digest(folder)
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(bytes(data))
    assert_refused(folder, WEIGHTS, "does not match its digest", expected_digest=digest)


def test_an_adapter_of_another_base_is_refused_by_its_lineage(folder: Path) -> None:
    (folder / "graft.json").write_text(json.dumps({"base_model": "other", "base_model_digest": "sha256:other"}))
    assert_refused(folder, "graft.json", "another base model")


@pytest.mark.parametrize("lineage", [{"base_model_digest": "sha256:base"}, {}])
def test_lineage_that_agrees_or_says_nothing_is_accepted(folder: Path, lineage: dict[str, str]) -> None:
    (folder / "graft.json").write_text(json.dumps(lineage))
    check(folder)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path / "nowhere", CONFIG, "is missing", expected_digest="sha256:0")


@pytest.fixture
def model_folder(tmp_path: Path) -> Callable[[dict[str, tuple[int, ...]]], Path]:
    def make(tensors: dict[str, tuple[int, ...]]) -> Path:
        write_safetensors(tmp_path / "model.safetensors", tensors)
        return tmp_path

    return make


def test_base_shapes_are_those_of_the_adaptable_layers(
    model_folder: Callable[[dict[str, tuple[int, ...]]], Path],
) -> None:
    folder = model_folder(
        {
            f"{Q}.weight": (8, 16),
            f"{Q}.bias": (8,),
            "model.embed_tokens.weight": (32, 16),
            "model.norm.weight": (16,),
            "lm_head.weight": (32, 16),
        }
    )
    assert base_shapes(tiny_base(folder)).linear == {Q: (8, 16)}


def test_a_base_model_without_adaptable_layers_is_refused(
    model_folder: Callable[[dict[str, tuple[int, ...]]], Path],
) -> None:
    with pytest.raises(FailedPrecondition, match="q_proj"):
        base_shapes(tiny_base(model_folder({"model.norm.weight": (16,)})))


def test_a_damaged_file_outside_an_adapter_is_told_too(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(FailedPrecondition, match=r"model\.safetensors: is truncated"):
        read_header(tmp_path / "model.safetensors")
