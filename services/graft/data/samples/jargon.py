"""The Jargon File's entries as raw text, from Debian's package `jargon-text`."""

import gzip
import re
from pathlib import Path

from graft.data.samples.common import Material, damaged, missing, split

_ENTRY = re.compile(r"\n(?=   :[^\n]+:)")
_END = re.compile(r"\n {10,}Part III\. |\n +\w\n *\n")
"""What follows the last entry, or that of a letter."""
_CHARACTERS = range(200, 1501)
"""Shorter entries only refer to another; longer ones are cut by no context, but would take most of the time."""


def jargon(n_train: int, n_heldout: int, file: Path, seed: int = 0) -> Material:
    """One row an entry, its lines joined to paragraphs. `file` is `jargon.txt.gz`.

    Raises FailedPrecondition when it is missing or another, InvalidArgument when it has fewer entries.
    """
    try:
        text = gzip.decompress(file.read_bytes()).decode()
    except FileNotFoundError:
        raise missing(file) from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise damaged(file, error) from error
    entries = {_plain(_END.split(entry, maxsplit=1)[0]) for entry in _ENTRY.split(text)[1:]}
    rows = [{"text": entry} for entry in sorted(entries) if len(entry) in _CHARACTERS]
    train, heldout = split(rows, n_train, n_heldout, seed, "entries")
    return Material(
        name="jargon",
        title="Entries of the Jargon File",
        format="text",
        train=tuple(train),
        heldout=tuple(heldout),
        source="Jargon File 4.4.7 in Debian's jargon-text",
        license="public domain",
    )


def _plain(entry: str) -> str:
    paragraphs = re.split(r"\n\s*\n", entry.strip())
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
