"""Loads a base model's own tokenizer, and transformers without torch.

Owns the import of transformers for processes that compute nothing with it.
"""

import importlib
import os
import sys
import threading
from functools import lru_cache
from typing import Any


def import_tokenizers() -> None:
    """Imports transformers without torch, for a process that computes nothing: it spares 400 MB and three seconds.

    Call it before other threads start. transformers remembers that it found no torch; whoever imports torch later
    gets it.
    """
    hidden: dict[str, Any] = sys.modules
    if "torch" in hidden or "transformers" in hidden:
        return  # too late to spare it
    hidden["torch"] = None
    try:
        importlib.import_module("transformers").AutoTokenizer  # noqa: B018 - its modules are imported on first use
    finally:
        del hidden["torch"]


def load_tokenizer(path: str) -> Any:
    """The tokenizer in a base model's folder; safe to call from any thread."""
    # One thread at a time: while one imports transformers, another finds the module half made.
    with _loading:
        return _load_tokenizer(path, _stamp(path))


_loading = threading.Lock()


def _stamp(path: str) -> tuple[tuple[str, int, int], ...]:
    """Another one once the folder is another's: a base model that was removed may be made anew by the same name."""
    try:
        found = [(file.name, file.stat()) for file in os.scandir(path) if not file.name.endswith(".safetensors")]
    except OSError:  # transformers says what is missing
        return ()
    return tuple(sorted((name, about.st_ino, about.st_mtime_ns) for name, about in found))


@lru_cache(maxsize=4)
def _load_tokenizer(path: str, _stamp: tuple[tuple[str, int, int], ...]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, local_files_only=True)
