"""Fenced blocks of Markdown in completions."""

import re

_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)
"""Language and content. A fence that a length limit left open reaches to the end. It does not backtrack over more than
the text's length for each of its openings."""


def first_fence(text: str, *languages: str) -> str | None:
    """The content of the first fence with one of `languages`, or else of the first that names none, or None."""
    unnamed = None
    for match in _FENCE.finditer(text):
        language, content = match.groups()
        if language.lower() in languages:
            return str(content)
        if not language and unnamed is None:
            unnamed = str(content)
    return unnamed
