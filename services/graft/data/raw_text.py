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
from itertools import chain
from pathlib import Path

from graft.data.rendering import Example, Tokenizer, compact
from graft.domain.errors import InvalidArgument

_SKIPPED_FOLDERS = frozenset({"test", "tests", "idlelib", "lib2to3", "tkinter", "site-packages", "dist-packages"})
_SHORTEST_DOCSTRING = 400
"""Characters: shorter ones are mostly a sentence about one name."""
HELD_OUT_SHARE = 20
"""One document of so many is never learned."""
PART_CHARACTERS = 16_384
"""About eight sequences of healing: short enough that even a text of a few hundred kilobytes has some to hold out."""


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
    """Each `text` of a JSONL file; a text file in parts that end with a line, each taken for a document.

    Reads no more than is asked for. Raises InvalidArgument that names the line.
    """
    try:
        with open(path, encoding="utf-8") as file:
            if path.suffix != ".jsonl":
                while part := file.read(PART_CHARACTERS) + file.readline(PART_CHARACTERS):
                    yield part
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _text(path, number, line)
    except OSError as error:
        raise InvalidArgument(f"{path} cannot be read: {error.strerror}.", reason="TEXT_UNREADABLE") from None
    except UnicodeDecodeError:
        raise InvalidArgument(f"{path} is not UTF-8 text.", reason="TEXT_UNREADABLE") from None


def sequences(
    documents: Iterable[str], tokenizer: Tokenizer, length_tokens: int, most_tokens: int, most_held_out: int
) -> tuple[list[Example], list[Example]]:
    """Sequences to learn and held-out ones, each of one document, at most `length_tokens` long, all with loss.

    A document's end token is part of its last sequence. Whole documents are held out, so that no sentence goes on from
    one side to the other; of a single document, sequences are. Which ones follows from the content alone, and so does
    the order, so that the first few are a sample of all; no sequence occurs twice. Stops once `most_tokens` are there
    to learn and `most_held_out` sequences are held out: fewer of the first do not mean fewer of the second.
    """
    learned: dict[bytes, list[Example]] = {}
    held_out: dict[bytes, list[Example]] = {}
    # One that was not needed to learn, for the case that so few documents leave none held out.
    spare: dict[bytes, list[Example]] = {}
    seen: set[bytes] = set()
    tokens = measured = 0
    for unit in _units(documents, tokenizer, length_tokens):
        fresh = {_digest(piece): piece for piece in unit if len(piece) >= 2}
        pieces = [compact(piece, [1] * len(piece)) for digest, piece in fresh.items() if digest not in seen]
        seen |= fresh.keys()
        if not pieces:
            continue
        digest = _digest([token for piece in unit for token in piece])
        if digest[0] % HELD_OUT_SHARE == 0:
            held_out[digest] = pieces
            measured += len(pieces)
        elif tokens < most_tokens:
            learned[digest] = pieces
            tokens += sum(len(piece.token_ids) for piece in pieces)
        else:
            spare = spare or {digest: pieces}
        if tokens >= most_tokens and measured >= most_held_out:
            break
    held_out = held_out or spare
    if not held_out and len(learned) > 1:
        first = min(learned)
        held_out[first] = learned.pop(first)
    return _in_order(learned), _in_order(held_out)[:most_held_out]


def _units(documents: Iterable[str], tokenizer: Tokenizer, length_tokens: int) -> Iterator[list[list[int]]]:
    """The sequences of each document; each sequence alone where there is one document only."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def cut(document: str) -> list[list[int]]:
        token_ids = tokenizer.encode(document, add_special_tokens=False) + end
        return [token_ids[start : start + length_tokens] for start in range(0, len(token_ids), length_tokens)]

    rest = iter(documents)
    first, second = next(rest, None), next(rest, None)
    if first is None:
        return
    if second is None:
        yield from ([piece] for piece in cut(first))
        return
    yield from map(cut, chain((first, second), rest))


def _digest(token_ids: list[int]) -> bytes:
    return hashlib.sha256(repr(token_ids).encode()).digest()


def _in_order(units: dict[bytes, list[Example]]) -> list[Example]:
    """By their own digests: neighbours of one document are no sample of all."""
    return sorted(chain.from_iterable(units.values()), key=lambda piece: _digest(list(piece.token_ids)))


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
