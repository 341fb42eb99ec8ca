"""HTML pages that need nothing else to be read: rendered from a template, written whole.

Owns the frame (`page.html.jinja`), what the pages share (`macros.jinja`) and the file; the geometry of each chart is
`graft.evaluation.charts`. Does not know what a page says. Texts come from strangers, so a page escapes everything, and
its content security policy forbids scripts and every load.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from graft.domain.units import count_text, size_text
from graft.evaluation import charts
from graft.evaluation.bootstrap import LEVEL, RESAMPLES

_EXAMPLES = 8  # two or three screens: more is read by nobody
_FOLD_AT_CHARACTERS = 480  # about eight lines of a column; the rest of a longer text opens on request


@dataclass(frozen=True)
class Said:
    """The answers of one model as examples show them; `main` stands out."""

    name: str
    answers: Sequence[str]
    scores: Sequence[float]
    main: bool


def render(template: str, **values: Any) -> str:
    """One HTML page that asks the network for nothing and needs no script."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Globals rather than variables of the page: imported macros see no others.
    environment.globals |= {
        "level": f"{LEVEL:.0%}",
        "resamples": f"{RESAMPLES:,}",
        "score_axis": charts.score_axis,
        "difference_axis": charts.difference_axis,
        "example_rows": example_rows,
        "fold": fold,
        "size_text": size_text,
        "count_text": count_text,
    }
    return environment.get_template(template).render(**values)


def write(page: str, path: Path) -> Path:
    """Writes `path` in UTF-8, whole or not at all, making its folder if need be. Returns `path`."""
    # UTF-8 has no bytes for half a surrogate pair, which JSON can carry: a browser shows its reference as U+FFFD.
    data = page.encode("utf-8", "xmlcharrefreplace")
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_bytes(data)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
    return path


def example_rows(said: Sequence[Said]) -> list[int]:
    """Rows to show, in the data set's order within each kind: scores differ, answers differ, all agree.

    Nothing else decides, so the rows favour nobody.
    """
    if not said:
        return []

    def kind(row: int) -> int:
        if len({each.scores[row] for each in said}) > 1:
            return 0
        return 1 if len({each.answers[row] for each in said}) > 1 else 2

    return sorted(range(len(said[0].answers)), key=kind)[:_EXAMPLES]


def fold(text: str) -> tuple[str, str]:
    """The start of a long text, cut between words where it has any, and the rest."""
    if len(text) <= _FOLD_AT_CHARACTERS * 5 // 4:  # nobody wants to unfold half a line
        return text, ""
    head = text[:_FOLD_AT_CHARACTERS]
    cut = max(head.rfind(" "), head.rfind("\n"))
    cut = cut if cut > _FOLD_AT_CHARACTERS // 2 else _FOLD_AT_CHARACTERS
    return text[:cut], text[cut:]
