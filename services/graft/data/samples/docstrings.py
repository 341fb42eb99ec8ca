"""Functions of the running Python's standard library and the first lines of their docstrings, in both directions."""

import ast
import functools
import os
import sys
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

from graft.data.samples.common import Material, Sample, chat_row, split, text_key

MAX_SOURCE_CHARACTERS = 500
"""Of a function: some 150 tokens, so that a few hundred rows train in minutes on two cores."""
_MIN_SOURCE_CHARACTERS = 80
"""Shorter functions are mostly a `pass` or a `raise`, from which no docstring can be told."""
_SUMMARY_CHARACTERS = range(20, 101)
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "tkinter", "turtledemo", "ensurepip", "site-packages", "dist-packages"}
)
"""No library code, or parts that some distributions leave out: the rows should be the same everywhere."""


def docstrings(
    n_train: int, n_heldout: int, seed: int = 0, max_source_characters: int = MAX_SOURCE_CHARACTERS
) -> Sample:
    """Functions of the running Python's standard library, without their docstring, and its first line as the answer.

    The same Python, numbers and seed give the same rows. Raises InvalidArgument when there are fewer.
    """
    functions = _distinct(max_source_characters)
    task = "Write the first line of this Python function's docstring."
    rows = [chat_row(task, source, summary) for source, summary in functions]
    train, heldout = split(rows, n_train, n_heldout, seed, "documented functions")
    return Sample(
        name="docstrings",
        title="Docstrings of Python functions",
        train=tuple(train),
        heldout=tuple(heldout),
        labels=(),
        source=_source(),
        license="PSF-2.0",
    )


def functions(n_train: int, n_heldout: int, seed: int = 0, max_source_characters: int = 300) -> Material:
    """The other direction: signature and docstring, and the function's body as the answer. The bodies are short, since
    what is scored must be generated token by token.

    The same Python, numbers and seed give the same rows. Raises InvalidArgument when there are fewer.
    """
    rows: dict[str, dict[str, str]] = {}
    for source, summary in _distinct(max_source_characters):
        lines = source.splitlines()
        (function,) = ast.parse(source).body
        assert isinstance(function, ast.FunctionDef)
        first = function.body[0].lineno - 1
        if first:  # a body on the line of its `def` has no place for a docstring
            signature = "\n".join(lines[:first]).rstrip()
            body = textwrap.dedent("\n".join(lines[first:])).strip()
            row = {
                "instruction": "Complete this Python function. Answer with its body only.",
                "input": f'{signature}\n    """{summary}"""',
                "output": body,
            }
            rows.setdefault(text_key(body), row)
    train, heldout = split(list(rows.values()), n_train, n_heldout, seed, "documented functions")
    return Material(
        name="code",
        title="Python functions from signature and docstring",
        format="alpaca",
        train=tuple(train),
        heldout=tuple(heldout),
        source=_source(),
        license="PSF-2.0",
    )


def _source() -> str:
    return f"standard library of Python {sys.version_info.major}.{sys.version_info.minor}"


def _distinct(max_source_characters: int) -> list[tuple[str, str]]:
    """Functions and their summaries. Copies abound (asyncio's policies, the pure-Python twins of C modules): the first
    of each is kept."""
    found: dict[str, tuple[str, str]] = {}
    summaries: set[str] = set()
    for source, summary in _documented_functions():
        if not _MIN_SOURCE_CHARACTERS <= len(source) <= max_source_characters:
            continue
        if text_key(source) not in found and text_key(summary) not in summaries:
            found[text_key(source)] = source, summary
            summaries.add(text_key(summary))
    return list(found.values())


@functools.cache
def _documented_functions() -> tuple[tuple[str, str], ...]:
    """Source without docstring, and the docstring's first line, in the order of paths and lines. Takes 2 s once."""
    library = Path(sysconfig.get_path("stdlib"))
    found: list[tuple[str, str]] = []
    for folder, subfolders, names in os.walk(library):
        subfolders[:] = sorted(set(subfolders) - _SKIPPED_FOLDERS)
        for name in sorted(names):
            if name.endswith(".py"):
                text = Path(folder, name).read_text(encoding="utf-8", errors="replace")
                found += _functions_in(ast.parse(text).body, text.splitlines())
    return tuple(found)


def _functions_in(statements: Iterable[ast.stmt], lines: list[str]) -> Iterator[tuple[str, str]]:
    """Of a module and its classes; functions inside functions are no part of anybody's interface."""
    for statement in statements:
        if isinstance(statement, ast.ClassDef):
            yield from _functions_in(statement.body, lines)
        elif isinstance(statement, ast.FunctionDef) and (found := _without_docstring(statement, lines)) is not None:
            yield found


def _without_docstring(function: ast.FunctionDef, lines: list[str]) -> tuple[str, str] | None:
    documentation = ast.get_docstring(function)
    if not documentation or len(function.body) < 2:
        return None
    first, *others = documentation.splitlines()
    # PEP 257's summary line: one sentence, then nothing or an empty line.
    is_summary = first.endswith(".") and (not others or not others[0]) and first.isascii() and first[0].isupper()
    expression = function.body[0]
    if not is_summary or len(first) not in _SUMMARY_CHARACTERS or expression.lineno == function.lineno:
        return None
    rest = lines[expression.end_lineno : function.end_lineno]
    source = textwrap.dedent("\n".join([*lines[function.lineno - 1 : expression.lineno - 1], *rest])).strip()
    return source, first
