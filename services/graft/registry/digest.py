"""The content digest of an adapter or a model: what makes a version immutable and names it inside the engine."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

FILES = ("adapter_config.json", "adapter_model.safetensors")
"""What an adapter is. Other files in the folder (graft.json, README) describe it and are not part of the digest."""
MODEL_CONFIG = "config.json"
DESCRIPTIONS = frozenset({"graft.json", "README.md"})


def adapter_digest(folder: Path) -> str:
    """`sha256:<hex>` over name, length and bytes of the two files. Raises FileNotFoundError for a missing one."""
    return _digest(folder / name for name in FILES)


def model_files(folder: Path) -> list[Path]:
    """What a model is: all that its folder holds, by name, but for what describes it (graft.json, README)."""
    return sorted(path for path in folder.iterdir() if path.is_file() and path.name not in DESCRIPTIONS)


def model_digest(folder: Path) -> str:
    """`sha256:<hex>` over name, length and bytes of a model's files. Raises FileNotFoundError without a config.json."""
    if not (folder / MODEL_CONFIG).is_file():
        raise FileNotFoundError(2, "missing", str(folder / MODEL_CONFIG))
    return _digest(model_files(folder))


def _digest(paths: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for path in paths:
        total.update(f"{path.name}\n{path.stat().st_size}\n".encode())
        with open(path, "rb") as file:
            while block := file.read(1024 * 1024):
                total.update(block)
    return f"sha256:{total.hexdigest()}"
