"""Raw text: documents of a file or of Python's own documentation, cut into sequences that are learned whole.

Does not know models (`graft.training`).
"""

import ast
import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from graft.data.rendering import Example, Tokenizer, compact
from graft.domain.errors import InvalidArgument

_SKIPPED_FOLDERS = frozenset({"test", "tests", "idlelib", "lib2to3", "tkinter", "site-packages", "dist-packages"})
_SHORTEST_DOCSTRING = 400
"""Characters: shorter ones are mostly a sentence about one name."""
HELD_OUT_SHARE = 20
"""One sequence of so many is never learned."""


def python_documentation() -> Iterator[str]:
    """Prose that every Python carries: its language reference as `help()` shows it, and the library's long docstrings.

    About 1.3 MB under the PSF licence, in the same order everywhere.
    """
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name].strip()
    for folder, subfolders, names in os.walk(sysconfig.get_path("stdlib")):
        subfolders[:] = sorted(set(subfolders) - _SKIPPED_FOLDERS)
        for name in sorted(names):
            if name.endswith(".py"):
                yield from _docstrings(Path(folder, name))


def default_source() -> str:
    """What `python_documentation` read, for people."""
    return f"documentation in Python {sys.version_info.major}.{sys.version_info.minor} (PSF-2.0)"


def read_documents(path: Path) -> Iterator[str]:
    """A text file as one document, or each `text` of a JSONL file. Raises InvalidArgument that names the line."""
    try:
        with open(path, encoding="utf-8") as file:
            if path.suffix != ".jsonl":
                yield file.read()
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _text(path, number, line)
    except OSError as error:
        raise InvalidArgument(f"{path} cannot be read: {error.strerror}.", reason="TEXT_UNREADABLE") from None
    except UnicodeDecodeError:
        raise InvalidArgument(f"{path} is not UTF-8 text.", reason="TEXT_UNREADABLE") from None


def sequences(
    documents: Iterable[str], tokenizer: Tokenizer, length_tokens: int, most_tokens: int
) -> tuple[list[Example], list[Example]]:
    """Sequences to learn and held-out ones, each of one document, at most `length_tokens` long, all with loss.

    A document's end token is part of its last sequence. What is held out follows from the content alone, and so does
    the order, so that the first few are a sample of all; no sequence occurs twice. Stops once `most_tokens` are there
    to learn.
    """
    learned: dict[bytes, Example] = {}
    held_out: dict[bytes, Example] = {}
    tokens = 0
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for document in documents:
        token_ids = tokenizer.encode(document, add_special_tokens=False) + end
        for start in range(0, len(token_ids), length_tokens):
            piece = token_ids[start : start + length_tokens]
            digest = hashlib.sha256(repr(piece).encode()).digest()
            side = held_out if digest[0] % HELD_OUT_SHARE == 0 else learned
            if len(piece) < 2 or digest in side:
                continue
            side[digest] = compact(piece, [1] * len(piece))
            tokens += len(piece) if side is learned else 0
        if tokens >= most_tokens:
            break
    return [learned[digest] for digest in sorted(learned)], [held_out[digest] for digest in sorted(held_out)]


def _text(path: Path, number: int, line: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise InvalidArgument(f"{path}, line {number}: needs a JSON object with a `text`.", reason="TEXT_INVALID")
    return text


def _docstrings(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8", errors="replace"))
    except (SyntaxError, OSError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= _SHORTEST_DOCSTRING:
                yield text
