"""Two real tasks for demonstrations and benchmarks, read from packages that set-up fetched; nothing is vendored.

Film reviews (classification) and docstrings of Python's standard library (generation). Owns rows, labels, prompts and
the split into training and held-out rows; does not know models or metrics (`graft.evaluation`).
"""

import ast
import functools
import hashlib
import io
import json
import os
import sys
import sysconfig
import tarfile
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypedDict

from graft.domain.errors import FailedPrecondition, InvalidArgument

REVIEWS_ARCHIVE = Path(sys.prefix) / "share" / "graft" / "vaderSentiment-3.3.2.tar.gz"
"""Where `deploy/setup/fetch.py` puts it."""
_INNER_ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
_INNER_FILE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
_LAST_POSITIVE, _LAST_NEGATIVE = 5152, 10312
"""Rows to 5152 are of reviews that their critics call fresh, those to 10312 of rotten ones; the rest is unlabelled."""
MAX_SOURCE_CHARACTERS = 500
"""Of a function: some 150 tokens, so that a few hundred rows train in minutes on two cores."""
_MIN_SOURCE_CHARACTERS = 80
"""Shorter functions are mostly a `pass` or a `raise`, from which no docstring can be told."""
_SUMMARY_CHARACTERS = range(20, 101)
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "tkinter", "turtledemo", "ensurepip", "site-packages", "dist-packages"}
)
"""No library code, or parts that some distributions leave out: the rows should be the same everywhere."""


Message: TypeAlias = dict[str, str]
"""One turn of a chat: `role` and `content`."""


class Row(TypedDict):
    """One `messages` row: a system turn, a user turn, and the answer as the assistant's turn."""

    messages: list[Message]


@dataclass(frozen=True)
class Sample:
    """A task's rows. No held-out row's input or, for generation, answer occurs among the training rows."""

    name: str
    title: str
    train: tuple[Row, ...]
    heldout: tuple[Row, ...]
    labels: tuple[str, ...]
    """All possible answers of a classification task; empty when the answer is free text."""
    source: str
    license: str


def reviews(n_train: int, n_heldout: int, seed: int = 0, archive: Path = REVIEWS_ARCHIVE) -> Sample:
    """Sentences of film reviews (Hutto and Gilbert, ICWSM 2014), labelled by their critic, as many of each label.

    The same numbers and seed give the same rows everywhere; held-out rows do not depend on `n_train`. Raises
    FailedPrecondition when the archive is missing or not the expected one, InvalidArgument when it has fewer rows.
    """
    labels = ("positive", "negative")
    by_label: dict[str, dict[str, str]] = {label: {} for label in labels}
    for number, text in _review_lines(archive):
        if number <= _LAST_NEGATIVE:
            by_label["positive" if number <= _LAST_POSITIVE else "negative"].setdefault(_key(text), text)
    disputed = by_label["positive"].keys() & by_label["negative"].keys()
    train: list[Row] = []
    heldout: list[Row] = []
    for index, label in enumerate(labels):
        rows = [
            _row("Is this film review positive or negative? Answer with one word.", text, label)
            for key, text in by_label[label].items()
            if key not in disputed
        ]
        # An odd number gives its last row to the first label.
        mine, others = _split(rows, (n_train + 1 - index) // 2, (n_heldout + 1 - index) // 2, seed, f"{label} reviews")
        train += mine
        heldout += others
    return Sample(
        name="reviews",
        title="Sentiment of film reviews",
        train=tuple(_shuffled(train, seed)),
        heldout=tuple(_shuffled(heldout, seed)),
        labels=labels,
        source="vaderSentiment 3.3.2, movieReviewSnippets",
        license="MIT",
    )


def docstrings(
    n_train: int, n_heldout: int, seed: int = 0, max_source_characters: int = MAX_SOURCE_CHARACTERS
) -> Sample:
    """Functions of the running Python's standard library, without their docstring, and its first line as the answer.

    The same Python, numbers and seed give the same rows. Raises InvalidArgument when there are fewer.
    """
    functions: dict[str, tuple[str, str]] = {}
    answers: set[str] = set()
    for source, summary in _documented_functions():
        if not _MIN_SOURCE_CHARACTERS <= len(source) <= max_source_characters:
            continue
        # Copies abound (asyncio's policies, the pure-Python twins of C modules): the first of each is kept.
        if _key(source) not in functions and _key(summary) not in answers:
            functions[_key(source)] = source, summary
            answers.add(_key(summary))
    task = "Write the first line of this Python function's docstring."
    rows = [_row(task, source, summary) for source, summary in functions.values()]
    train, heldout = _split(rows, n_train, n_heldout, seed, "documented functions")
    return Sample(
        name="docstrings",
        title="Docstrings of Python functions",
        train=tuple(train),
        heldout=tuple(heldout),
        labels=(),
        source=f"standard library of Python {sys.version_info.major}.{sys.version_info.minor}",
        license="PSF-2.0",
    )


def answer(row: Row) -> str:
    """What the assistant should say."""
    return row["messages"][-1]["content"]


def zero_shot(row: Row) -> list[Message]:
    """The row without its answer, as a chat to be completed; it is also what an adapter was trained on."""
    return row["messages"][:-1]


def few_shot(row: Row, shots: Sequence[Row]) -> list[Message]:
    """The row without its answer, after `shots` as earlier turns of the same chat."""
    system, *question = zero_shot(row)
    return [system, *(turn for shot in shots for turn in shot["messages"][1:]), *question]


def choose_shots(sample: Sample, count: int) -> list[Row]:
    """The first training rows, as many of each label as `count` allows, alternating."""
    if not sample.labels:
        return list(sample.train[:count])
    by_label = [[row for row in sample.train if answer(row) == label] for label in sample.labels]
    return [row for turn in zip(*by_label, strict=False) for row in turn][:count]


def write_rows(rows: Iterable[Row], path: Path) -> Path:
    """Writes JSONL as `graft.data.formats` reads it."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def _row(system: str, question: str, reply: str) -> Row:
    turns = (("system", system), ("user", question), ("assistant", reply))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _key(text: str) -> str:
    """Equal for texts that differ in case, spaces and punctuation only."""
    return "".join(character for character in text.lower() if character.isalnum())


def _shuffled(rows: Iterable[Row], seed: int) -> list[Row]:
    """By content hash: the order depends on nothing but the rows and the seed."""
    return sorted(rows, key=lambda row: hashlib.sha256(f"{seed}\n{json.dumps(row)}".encode()).digest())


def _split(rows: list[Row], n_train: int, n_heldout: int, seed: int, what: str) -> tuple[list[Row], list[Row]]:
    if n_train < 0 or n_heldout < 0 or n_train + n_heldout > len(rows):
        raise InvalidArgument(
            f"{n_train} training and {n_heldout} held-out rows were asked for; there are {len(rows)} {what}.",
            reason="SAMPLE_TOO_SMALL",
        )
    shuffled = _shuffled(rows, seed)
    return shuffled[n_heldout : n_heldout + n_train], shuffled[:n_heldout]


def _review_lines(archive: Path) -> Iterator[tuple[int, str]]:
    if not archive.is_file():
        raise FailedPrecondition(
            f"The film reviews are missing: {archive} does not exist. Run `make setup`.", reason="SAMPLE_MISSING"
        )
    try:
        lines = _member(_member(archive.read_bytes(), _INNER_ARCHIVE), _INNER_FILE).decode().splitlines()
    except (tarfile.TarError, KeyError, UnicodeDecodeError, OSError, EOFError) as error:
        raise FailedPrecondition(
            f"{archive} cannot be read ({error}). Delete it and run `make setup`.", reason="SAMPLE_DAMAGED"
        ) from error
    for line in lines:
        number, _rating, text = line.split("\t", 2)
        yield int(number), text.strip()


def _member(archive: bytes, path: str) -> bytes:
    """A file's content, read without unpacking anything to disk. Raises KeyError when it is not there."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        for member in files:
            if member.name.endswith(path) and (content := files.extractfile(member)) is not None:
                return content.read()
    raise KeyError(path)


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
