"""Which of the known formats a row has, by its keys alone.

A row with the keys of one format is that format's. A row that could be read in two ways is nobody's until the format is
declared: guessing wrong would train on the wrong text, quietly. What good values are is in `graft.data.rows`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from graft.domain.resources import DatasetFormat

Fault = tuple[str, str]
"""Field within the row (empty for the row itself), and what is wrong."""

SHOWN_CHARACTERS = 80
"""Of a key or value quoted in a fault: it may be as long as its line."""


@dataclass(frozen=True)
class Layout:
    """The keys of a format."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    signature: tuple[str, ...] = ()
    """Keys that hardly any other row has: one of them shows what was meant where another key is missing."""
    open: bool = False
    """Takes further keys, which a template or grader reads."""

    @cached_property
    def keys(self) -> frozenset[str]:
        """All that it reads by name."""
        return frozenset(self.required + self.optional)

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether a row has these keys and no other, so that it is of no other format."""
        return not self.open and row.keys() <= self.keys and all(key in row for key in self.required)


LAYOUTS = {
    DatasetFormat.MESSAGES: Layout(("messages",), ("tools",), ("messages",)),
    DatasetFormat.PROMPT_COMPLETION: Layout(("prompt", "completion"), (), ("completion",)),
    DatasetFormat.TEXT: Layout(("text",), (), ("text",)),
    DatasetFormat.QUESTION_ANSWER: Layout(("question", "answer"), ("context",), ("question",)),
    DatasetFormat.ALPACA: Layout(("instruction", "output"), ("input",), ("instruction",)),
    DatasetFormat.SHAREGPT: Layout(("conversations",), (), ("conversations",)),
    DatasetFormat.PREFERENCE: Layout(("chosen", "rejected"), ("prompt",), ("chosen", "rejected")),
    DatasetFormat.OPENAI_PREFERENCE: Layout(
        ("input", "preferred_output", "non_preferred_output"), (), ("preferred_output", "non_preferred_output")
    ),
    DatasetFormat.GRADED_PROMPTS: Layout((), ("prompt", "messages"), (), open=True),
    DatasetFormat.FIELDS: Layout((), (), (), open=True),
}


_ANSWERS = ("completion", "chosen", "rejected", "preferred_output", "non_preferred_output")


@dataclass(frozen=True)
class Candidate:
    """One way to read a row."""

    format: DatasetFormat
    ignored: tuple[str, ...]
    missing: tuple[str, ...] = ()

    def told(self) -> str:
        """`text (would ignore 'label')`."""
        parts = []
        if self.missing:
            parts.append(f"lacks {quoted(self.missing)}")
        parts.append(f"would ignore {quoted(self.ignored)}" if self.ignored else "would ignore nothing")
        return f"{self.format} ({', '.join(parts)})"


def candidates(row: Mapping[str, Any]) -> list[Candidate]:
    """Every way to read a row: none for an unknown one, several for an ambiguous one."""
    keys = set(row)
    complete = [format for format, layout in LAYOUTS.items() if layout.required and keys.issuperset(layout.required)]
    if _is_graded(row):
        complete.append(DatasetFormat.GRADED_PROMPTS)
    partial = [
        format for format, layout in LAYOUTS.items() if format not in complete and not keys.isdisjoint(layout.signature)
    ]
    if not complete and not partial:
        return [_candidate(DatasetFormat.PROMPT_COMPLETION, row)] if "prompt" in row else []
    if len(complete) > 1 or complete == [DatasetFormat.GRADED_PROMPTS]:
        partial = []
    elif complete:
        # Only what this reading leaves over can belong to another one.
        over = keys - LAYOUTS[complete[0]].keys
        partial = [format for format in partial if not over.isdisjoint(LAYOUTS[format].signature)]
        if complete == [DatasetFormat.TEXT] and over:
            # A text beside a label is as often a row to classify as a page with its number.
            partial.append(DatasetFormat.FIELDS)
    return [_candidate(format, row) for format in (*complete, *partial)]


def _is_graded(row: Mapping[str, Any]) -> bool:
    """A prompt without an answer, and something to judge one by."""
    if not row.keys().isdisjoint(_ANSWERS):
        return False
    if "prompt" in row:
        return len(row) > 1
    return _ends_with_user(row.get("messages")) and not row.keys() <= {"messages", "tools"}


def _ends_with_user(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and bool(messages)
        and isinstance(messages[-1], dict)
        and messages[-1].get("role") == "user"
    )


def _candidate(format: DatasetFormat, row: Mapping[str, Any]) -> Candidate:
    layout = LAYOUTS[format]
    ignored = () if layout.open else tuple(key for key in row if key not in layout.keys)
    return Candidate(format, ignored, tuple(key for key in layout.required if key not in row))


def shown(text: str) -> str:
    """Safe to send on: short, and without the half characters that JSON can spell and UTF-8 cannot."""
    return text[:SHOWN_CHARACTERS].encode("utf-8", "replace").decode()


def quoted(keys: tuple[str, ...]) -> str:
    """The first five keys, each in backquotes."""
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    return ", ".join(f"`{shown(key)}`" for key in keys[:5]) + more
