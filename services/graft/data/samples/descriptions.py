"""Debian packages: the long description, and its one-line summary as the answer."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from graft.data.samples.common import Material, split_groups, text_key
from graft.domain.errors import FailedPrecondition

STATUS = Path("/var/lib/dpkg/status")
"""What is installed, with both descriptions. Package lists hold the long one only where apt fetches translations."""
_LONG_CHARACTERS = range(100, 901)
_SUMMARY_CHARACTERS = range(15, 81)
_FIELDS = re.compile(r"^(Package|Source): (\S+)", re.MULTILINE)
_DESCRIPTION = re.compile(r"^Description(?:-en)?: (.+)\n((?: .*(?:\n|\Z))+)", re.MULTILINE)


def descriptions(n_train: int, n_heldout: int, seed: int = 0, status: Path = STATUS) -> Material:
    """What dpkg and apt know here. Packages of one source share whole paragraphs: they are on one side only.

    Rows depend on what this machine has. Raises FailedPrecondition where there is no dpkg, InvalidArgument when there
    are fewer rows.
    """
    groups: dict[str, list[dict[str, str]]] = {}
    seen: set[str] = set()
    for stanza in _stanzas(status):
        fields: dict[str, str] = dict(_FIELDS.findall(stanza))
        found = _DESCRIPTION.search(stanza)
        if found is None or "Package" not in fields:
            continue
        summary, text = found[1].strip(), _paragraphs(found[2])
        keys = {text_key(summary), text_key(text)}
        if len(text) in _LONG_CHARACTERS and len(summary) in _SUMMARY_CHARACTERS and not keys & seen:
            seen |= keys
            group = fields.get("Source", fields["Package"])
            groups.setdefault(group, []).append({"text": text, "summary": summary})
    train, heldout = split_groups(groups, n_train, n_heldout, seed, "descriptions")
    return Material(
        name="descriptions",
        title="One-line summaries of package descriptions",
        format="fields",
        train=tuple(train),
        heldout=tuple(heldout),
        source="Debian packages known to this machine's dpkg and apt",
        license="each package's own",
    )


def _stanzas(status: Path) -> Iterator[str]:
    if not status.is_file():
        raise FailedPrecondition(
            f"{status} does not exist: descriptions come from Debian's package manager. Run this showcase on Debian or "
            "a system made from it.",
            reason="SAMPLE_MISSING",
        )
    yield from status.read_text(encoding="utf-8", errors="replace").split("\n\n")
    if status == STATUS and shutil.which("apt-cache"):
        known = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, errors="replace")
        yield from known.stdout.split("\n\n")


def _paragraphs(description: str) -> str:
    lines = [line.strip() for line in description.splitlines()]
    return "\n\n".join(" ".join(part.split()) for part in re.split(r"\n\.\n", "\n".join(lines)) if part.strip())
