"""What the headers of safetensors files tell, without reading a tensor. Knows no base model's name.

The format: 8 bytes with the length of a JSON header, the header, then the tensors' bytes
(https://huggingface.co/docs/safetensors).
"""

import json
import math
import struct
from pathlib import Path
from typing import Any

_LFS_POINTER = b"version https://git-lfs"


class Damaged(Exception):
    """A file that is not what it should be; the message goes behind its name."""


def parameter_count(path: Path) -> int:
    """Of one file. Raises Damaged unless its header is whole and all of its tensors are there."""
    header, data_bytes = _header(path)
    try:
        tensors = [tensor for name, tensor in header.items() if name != "__metadata__"]
        needed_bytes = max((int(tensor["data_offsets"][1]) for tensor in tensors), default=0)
        count = sum(math.prod(map(int, tensor["shape"])) for tensor in tensors)
    except (KeyError, IndexError, TypeError, ValueError):
        raise Damaged("has a damaged header") from None
    if needed_bytes != data_bytes:
        raise Damaged(f"has {data_bytes:,} bytes of tensors, and its header names {needed_bytes:,}")
    return count


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and how many bytes follow it."""
    size_bytes = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(len(_LFS_POINTER))
        if start == _LFS_POINTER:
            raise Damaged("is a Git-LFS pointer, not the weights: run `git lfs pull` in its folder")
        # Bounded by the file: what is no safetensors file names any length.
        length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else size_bytes
        if 8 + length > size_bytes:
            raise Damaged("is cut off, or no safetensors file")
        file.seek(8)
        try:
            header = json.loads(file.read(length))
        except ValueError:
            header = None
    if not isinstance(header, dict):
        raise Damaged("has a damaged header")
    return header, size_bytes - 8 - length
