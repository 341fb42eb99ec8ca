"""What is known of a base model's folder: layers, context, size, digest.

Reads headers and files; never loads a model. Does not know the catalogue.
"""

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.domain.errors import FailedPrecondition
from graft.domain.shapes import Shape
from graft.registry.weights import Damaged, parameter_count

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a block in each of ARCHITECTURES: LoRA's `all-linear`."""
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Those that the tests train packed (tests/unit/test_architectures.py) and serve (tests/integration/
test_mixed_batches.py), with an adapter on LINEAR, to the log-probabilities of transformers and PEFT."""
LINEAGE = "graft-model.json"
"""In a folder that Graft made: where the weights come from."""
_TOKENIZERS = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
"""The files of which a folder needs one set."""
_HASHED = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class Facts:
    """Of one folder."""

    layers: int
    shape: Shape | None
    """None where `config.json` does not tell all of it."""
    context_tokens: int
    """Longest sequence that the model was made for or, where it is shorter, its attention's window."""
    digest: str
    """`sha256:…` over configuration, tokenizer and weights."""
    parameter_count: int
    size_bytes: int
    """Of the weights."""


def read_facts(base: str, folder: Path, cache: Path) -> Facts:
    """Measures `folder`; digests are kept in `cache` until a file changes.

    Raises FailedPrecondition: what `read_config` raises, BASE_MODEL_TOKENIZER_MISSING, BASE_MODEL_WEIGHTS_MISSING,
    BASE_MODEL_WEIGHTS_DAMAGED or BASE_MODEL_UNREADABLE.
    """
    config = read_config(base, folder)
    _check_tokenizer(base, folder)
    _check_shards(base, folder)
    try:
        layers, context_tokens = int(config["num_hidden_layers"]), _context_tokens(config)
    except (KeyError, TypeError, ValueError) as error:
        raise FailedPrecondition(
            f"Base model {base!r}: {folder / 'config.json'} has no usable {error}.", reason="BASE_MODEL_CONFIG_INVALID"
        ) from None
    try:
        measured = _measured(base, folder, cache)
    except OSError as error:
        raise FailedPrecondition(
            f"Base model {base!r}: {error.filename} cannot be used ({error.strerror}). Let whoever runs Graft read it; "
            "of a link, fetch what it points to.",
            reason="BASE_MODEL_UNREADABLE",
        ) from error
    return Facts(layers=layers, shape=_shape(config), context_tokens=context_tokens, **measured)


def read_config(base: str, folder: Path) -> dict[str, Any]:
    """The folder's `config.json`.

    Raises FailedPrecondition: BASE_MODEL_CONFIG_INVALID, UNSUPPORTED_ARCHITECTURE or BASE_MODEL_QUANTIZED.
    """
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        named = config.get("architectures") or ["none"]
        if not isinstance(named, list) or not isinstance(named[0], str):
            raise ValueError("`architectures` is no list of names")
        (architecture, *_) = named
    except (OSError, ValueError, AttributeError) as error:
        raise FailedPrecondition(
            f"Base model {base!r}: {folder / 'config.json'} cannot be read ({error}).",
            reason="BASE_MODEL_CONFIG_INVALID",
        ) from None
    if architecture not in ARCHITECTURES:
        raise FailedPrecondition(
            f"Base model {base!r} is a {architecture}; supported: {', '.join(ARCHITECTURES)}.",
            reason="UNSUPPORTED_ARCHITECTURE",
        )
    if config.get("quantization_config"):
        raise FailedPrecondition(
            f"Base model {base!r} is quantized (quantization_config in {folder / 'config.json'}), and training needs "
            "its weights in 16 or 32 bits. Take the repository that it was made from.",
            reason="BASE_MODEL_QUANTIZED",
        )
    return config


def _shape(config: dict[str, Any]) -> Shape | None:
    try:
        return Shape.of(config)
    except (KeyError, TypeError, ValueError):
        return None


def read_lineage(folder: Path) -> dict[str, Any]:
    """What Graft wrote of where the weights come from; empty for a folder that it did not make.

    Raises FailedPrecondition BASE_MODEL_LINEAGE_INVALID for a file that Graft did not write.
    """
    try:
        lineage = json.loads((folder / LINEAGE).read_text())
        if not isinstance(lineage, dict):
            raise ValueError("it is no object")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise FailedPrecondition(
            f"{folder / LINEAGE} cannot be read ({error}). Remove it; it only tells where the weights come from.",
            reason="BASE_MODEL_LINEAGE_INVALID",
        ) from None
    return lineage


def _check_tokenizer(base: str, folder: Path) -> None:
    if not any(all((folder / name).is_file() for name in names) for names in _TOKENIZERS):
        told = " or ".join(" with ".join(names) for names in _TOKENIZERS)
        raise FailedPrecondition(
            f"Base model {base!r}: {folder} holds no tokenizer ({told}).", reason="BASE_MODEL_TOKENIZER_MISSING"
        )


def _check_shards(base: str, folder: Path) -> None:
    """Every file that the index names, where there is one, must be there."""
    index = folder / "model.safetensors.index.json"
    try:
        named = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        missing = [name for name in named if not (folder / name).is_file()]
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise FailedPrecondition(
            f"Base model {base!r}: {index} cannot be read. Fetch it again.", reason="BASE_MODEL_WEIGHTS_DAMAGED"
        ) from None
    if missing:
        raise FailedPrecondition(
            f"Base model {base!r}: {folder} lacks {len(missing)} of the {len(named)} files that {index.name} names: "
            f"{', '.join(missing[:5])}{', …' * (len(missing) > 5)}. Fetch them.",
            reason="BASE_MODEL_WEIGHTS_MISSING",
        )


def _context_tokens(config: dict[str, Any]) -> int:
    """Training attends to everything before a token, so beyond a sliding window it would not be the served model.

    Qwen's configurations name a window that they do not use.
    """
    most = int(config["max_position_embeddings"])
    window = config.get("sliding_window")
    return min(most, int(window)) if window and config.get("use_sliding_window", True) else most


def _measured(base: str, folder: Path, cache: Path) -> dict[str, Any]:
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise FailedPrecondition(
            f"Base model {base!r}: {folder} holds no safetensors file.", reason="BASE_MODEL_WEIGHTS_MISSING"
        )
    files = [folder / name for name in _HASHED if (folder / name).is_file()] + weights
    stamps = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    # Hashing takes a second a gigabyte, so it is kept beside the cache, never in a folder of the user's.
    kept = cache / f"{hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]}-facts.json"
    with contextlib.suppress(
        OSError, ValueError, KeyError, TypeError, AttributeError
    ):  # measured anew, whatever is there
        known: dict[str, Any] = json.loads(kept.read_text())
        if known.pop("stamps") == stamps:
            return known
    parameters = sum(_parameters(base, path) for path in weights)
    total = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            total.update(f"{path.name}\n{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    measured = {
        "digest": f"sha256:{total.hexdigest()}",
        "parameter_count": parameters,
        "size_bytes": sum(path.stat().st_size for path in weights),
    }
    cache.mkdir(parents=True, exist_ok=True)
    fresh = kept.with_suffix(f".{os.getpid()}")
    fresh.write_text(json.dumps({"stamps": stamps} | measured))
    fresh.replace(kept)
    return measured


def _parameters(base: str, path: Path) -> int:
    try:
        return parameter_count(path)
    except Damaged as error:
        raise FailedPrecondition(
            f"Base model {base!r}: {path} {error}. Fetch it again.", reason="BASE_MODEL_WEIGHTS_DAMAGED"
        ) from None
