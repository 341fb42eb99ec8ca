"""The content digest of an adapter: what makes a version immutable and names it inside the engine."""

import hashlib
from pathlib import Path

FILES = ("adapter_config.json", "adapter_model.safetensors")
"""What an adapter is. Other files in the folder (graft.json, README) describe it and are not part of the digest."""


def adapter_digest(folder: Path) -> str:
    """`sha256:<hex>` over name, length and bytes of the two files. Raises FileNotFoundError for a missing one."""
    total = hashlib.sha256()
    for name in FILES:
        path = folder / name
        total.update(f"{name}\n{path.stat().st_size}\n".encode())
        with open(path, "rb") as file:
            while block := file.read(1024 * 1024):
                total.update(block)
    return f"sha256:{total.hexdigest()}"
