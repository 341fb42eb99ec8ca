"""Proves an adapter folder before the engine sees it: one that the engine refuses can end it for everyone.

Reads `adapter_config.json`, the header of `adapter_model.safetensors` and, where there is one, `graft.json`; compares
them with the headers of the base model's own safetensors files, so it holds for any architecture. Loads no weights
and knows neither vLLM nor torch. Every fault is FailedPrecondition with reason ADAPTER_INVALID, and `metadata` names
the file and the fault.
"""

import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from graft.domain.errors import FailedPrecondition
from graft.domain.resources import BaseModel
from graft.registry.digest import adapter_digest

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
LINEAGE = "graft.json"

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit, so that a damaged length is not taken for an allocation."""
_WIDTH_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4}
_WIDTH_BYTES |= {"I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1}
_ADAPTER_DTYPES = frozenset({"F32", "F16", "BF16"})
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_PLAIN_INITIALISATIONS = frozenset({"gaussian", "eva", "orthogonal"})
"""Initialisations that leave the base weights as they are. PiSSA, OLoRA, CorDA and LoftQ subtract from them."""
_UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "trainable_token_indices",
    "target_parameters",
)
"""Fields of PEFT's LoraConfig that change what the adapter means and that vLLM does not implement."""


class _Fault(Exception):
    """What is wrong with one file; `prove` turns it into the domain error."""

    def __init__(self, file: str, fault: str) -> None:
        super().__init__(fault)
        self.file = file
        self.fault = fault


@dataclass(frozen=True)
class Tensor:
    """One entry of a safetensors header."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class BaseShapes:
    """What an adapter is compared with."""

    id: str
    digest: str
    linear: dict[str, tuple[int, int]]
    """`model.layers.0.self_attn.q_proj` → (outputs, inputs), of the layers that may be adapted."""


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, from its header alone. Raises FailedPrecondition for a damaged file.

    Checks what the format promises (https://huggingface.co/docs/safetensors): a length, a JSON header, and offsets
    that cover the rest of the file without gap or overlap; so a file cut anywhere is found without reading its data.
    """
    try:
        return _header(path)
    except _Fault as fault:
        raise FailedPrecondition(f"{fault.file}: {fault.fault}.", reason="FILE_INVALID") from None


def base_shapes(base: BaseModel) -> BaseShapes:
    """Shapes of the base model's adaptable layers. Raises FailedPrecondition for a damaged base model folder."""
    linear = {
        name.removesuffix(".weight"): (tensor.shape[0], tensor.shape[1])
        for file in sorted(Path(base.path).glob("*.safetensors"))
        for name, tensor in read_header(file).items()
        if name.endswith(".weight") and len(tensor.shape) == 2 and name.split(".")[-2] in base.target_modules
    }
    if not linear:
        raise FailedPrecondition(
            f"Base model {base.id}: its folder holds no safetensors with {', '.join(base.target_modules)}.",
            reason="BASE_MODEL_INVALID",
        )
    return BaseShapes(base.id, base.digest, linear)


def prove(
    folder: Path,
    base: BaseShapes,
    *,
    model: str,
    max_lora_rank: int,
    expected_digest: str,
) -> None:
    """Proves that `folder` holds the adapter that `expected_digest` names and that the engine can load it.

    `model` is the adapter's name in messages. Raises FailedPrecondition naming the file and the fault.
    """
    try:
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise _Fault(name, "is missing")
        config = _json(folder / CONFIG)
        _prove_config(config, max_lora_rank)
        _prove_tensors(config, _header(folder / WEIGHTS), base)
        _prove_lineage(folder / LINEAGE, base)
        # Last, because it reads every byte; a cut file has been told in plainer words by then.
        actual = adapter_digest(folder)
        if actual != expected_digest:
            raise _Fault(WEIGHTS, f"does not match its digest: expected {expected_digest}, found {actual}")
    except _Fault as fault:
        raise FailedPrecondition(
            f"Adapter {model} cannot be served: {fault.file}: {fault.fault}.",
            reason="ADAPTER_INVALID",
            metadata={"model": model, "file": fault.file, "fault": fault.fault},
        ) from None
    except OSError as error:
        raise FailedPrecondition(
            f"Adapter {model} cannot be served: its files cannot be read ({error.strerror}).",
            reason="ADAPTER_INVALID",
            metadata={"model": model, "fault": error.strerror or "unreadable"},
        ) from error


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        raise _Fault(path.name, "is not JSON") from None
    if not isinstance(found, dict):
        raise _Fault(path.name, "is not a JSON object")
    return found


def _header(path: Path) -> dict[str, Tensor]:
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise _Fault(path.name, f"is truncated: {size_bytes} bytes")
        (header_bytes,) = struct.unpack("<Q", prefix)
        if header_bytes > MAX_HEADER_BYTES:
            raise _Fault(path.name, "is not a safetensors file: its header's length is out of bounds")
        raw = file.read(header_bytes)
    if len(raw) < header_bytes:
        raise _Fault(path.name, f"is truncated inside its header: {size_bytes} of {8 + header_bytes} bytes or more")
    try:
        header = json.loads(raw)
        entries = [
            (name, Tensor(str(entry["dtype"]), tuple(int(n) for n in entry["shape"])), *map(int, entry["data_offsets"]))
            for name, entry in header.items()
            if name != "__metadata__"
        ]
        tensors, end_bytes = _lay_out(path.name, entries)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise _Fault(path.name, "is not a safetensors file: its header cannot be read") from None
    expected_bytes = 8 + header_bytes + end_bytes
    if size_bytes != expected_bytes:
        fault = "is truncated" if size_bytes < expected_bytes else "has bytes after its last tensor"
        raise _Fault(path.name, f"{fault}: its header promises {expected_bytes} bytes, the file has {size_bytes}")
    return tensors


def _lay_out(file: str, entries: list[tuple[str, Tensor, int, int]]) -> tuple[dict[str, Tensor], int]:
    """The tensors by name, and where the data ends, relative to its start."""
    end_bytes = 0
    for name, tensor, start, stop in sorted(entries, key=lambda entry: entry[2:]):
        width = _WIDTH_BYTES.get(tensor.dtype)
        if width is None:
            raise _Fault(file, f"{name} has the unknown type {tensor.dtype}")
        if start != end_bytes or stop - start != width * math.prod(tensor.shape) or min(tensor.shape, default=0) < 0:
            raise _Fault(file, f"{name} does not lie where its shape says")
        end_bytes = stop
    return {name: tensor for name, tensor, _, _ in entries}, end_bytes


def _prove_config(config: dict[str, Any], max_lora_rank: int) -> None:
    def refuse(fault: str) -> NoReturn:
        raise _Fault(CONFIG, fault)

    if config.get("peft_type") != "LORA":
        refuse(f"peft_type is {config.get('peft_type')!r}; only 'LORA' can be served")
    for field in _UNSUPPORTED:
        if config.get(field):
            refuse(f"{field} is set, which the engine does not support")
    if config.get("bias", "none") != "none":
        refuse(f"bias is {config['bias']!r}; only 'none' can be served")
    initialisation = config.get("init_lora_weights", True)
    if isinstance(initialisation, str) and initialisation.lower() not in _PLAIN_INITIALISATIONS:
        refuse(f"init_lora_weights is {initialisation!r}, which changes the base model's weights")
    ranks = {"r": config.get("r"), **_pattern(config, "rank_pattern")}
    for name, rank in ranks.items():
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            refuse(f"{name}: the rank {rank!r} is not a positive integer")
        if rank > max_lora_rank:
            refuse(f"{name}: rank {rank} is above the service's max_lora_rank of {max_lora_rank}")
    alpha = config.get("lora_alpha")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        refuse(f"lora_alpha is {alpha!r}, not a number")


def _pattern(config: dict[str, Any], field: str) -> dict[str, Any]:
    pattern = config.get(field) or {}
    if not isinstance(pattern, dict):
        raise _Fault(CONFIG, f"{field} is not an object")
    return pattern


def _rank_of(config: dict[str, Any], module: str) -> int:
    """PEFT's rule: a key of `rank_pattern` is an expression for the end of a module's name; the first one wins."""
    for key, rank in _pattern(config, "rank_pattern").items():
        try:
            if re.fullmatch(rf"(.*\.)?({key})", module):
                return int(rank)
        except re.error:
            raise _Fault(CONFIG, f"rank_pattern: {key!r} is not a regular expression") from None
    return int(config["r"])


def _prove_tensors(config: dict[str, Any], tensors: dict[str, Tensor], base: BaseShapes) -> None:
    sides: dict[str, set[str]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise _Fault(WEIGHTS, f"{name} is not a tensor of a LoRA adapter")
        module, side = match["module"], match["side"]
        if module not in base.linear:
            raise _Fault(WEIGHTS, f"{name}: {base.id} has no such layer that can be adapted")
        if tensor.dtype not in _ADAPTER_DTYPES:
            raise _Fault(WEIGHTS, f"{name} has type {tensor.dtype}; expected one of F32, F16, BF16")
        outputs, inputs = base.linear[module]
        rank = _rank_of(config, module)
        expected = (rank, inputs) if side == "A" else (outputs, rank)
        if tensor.shape != expected:
            raise _Fault(
                WEIGHTS,
                f"{name} has shape {list(tensor.shape)}; {base.id} with rank {rank} needs {list(expected)}",
            )
        sides.setdefault(module, set()).add(side)
    if not sides:
        raise _Fault(WEIGHTS, "holds no tensors")
    for module, found in sides.items():
        if found != {"A", "B"}:
            raise _Fault(WEIGHTS, f"{module} has lora_{found.pop()} only")


def _prove_lineage(path: Path, base: BaseShapes) -> None:
    if not path.is_file():
        return
    digest = _json(path).get("base_model_digest")
    if digest is not None and digest != base.digest:
        raise _Fault(LINEAGE, f"was trained on another base model: {digest}, while {base.id} is {base.digest}")
