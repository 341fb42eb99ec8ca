"""What the samples share: their form, their order, and the split that keeps held-out rows out of training.

Does not know where rows are from, models or metrics.
"""

import hashlib
import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypedDict, TypeVar

from graft.domain.errors import FailedPrecondition, InvalidArgument

Message: TypeAlias = dict[str, str]
"""One turn of a chat: `role` and `content`."""


class Row(TypedDict):
    """One `messages` row: a system turn, a user turn, and the answer as the assistant's turn."""

    messages: list[Message]


RowT = TypeVar("RowT", bound=Mapping[str, object])


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


@dataclass(frozen=True)
class Material:
    """Rows of any format. No held-out row, nor another of its group (a question, a source package), is trained on."""

    name: str
    title: str
    format: str
    """As uploads declare it: a name of `graft.domain.resources.DatasetFormat`."""
    train: tuple[Mapping[str, Any], ...]
    heldout: tuple[Mapping[str, Any], ...]
    source: str
    license: str


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


def write_rows(rows: Iterable[Mapping[str, object]], path: Path) -> Path:
    """Writes JSONL as `graft.data.formats` reads it."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def chat_row(system: str, question: str, reply: str) -> Row:
    """A question and its answer as a chat."""
    turns = (("system", system), ("user", question), ("assistant", reply))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def text_key(text: str) -> str:
    """Equal for texts that differ in case, spaces and punctuation only."""
    return "".join(character for character in text.lower() if character.isalnum())


def shuffled(rows: Iterable[RowT], seed: int) -> list[RowT]:
    """By content hash: the order depends on nothing but the rows and the seed."""
    return sorted(rows, key=lambda row: hashlib.sha256(f"{seed}\n{json.dumps(row)}".encode()).digest())


def split(rows: Sequence[RowT], n_train: int, n_heldout: int, seed: int, what: str) -> tuple[list[RowT], list[RowT]]:
    """Training and held-out rows; the latter do not depend on how many the former are. Raises InvalidArgument."""
    if n_train < 0 or n_heldout < 0 or n_train + n_heldout > len(rows):
        raise _too_few(n_train, n_heldout, f"{len(rows)} {what}")
    ordered = shuffled(rows, seed)
    return ordered[n_heldout : n_heldout + n_train], ordered[:n_heldout]


def split_groups(
    groups: Mapping[str, Sequence[RowT]], n_train: int, n_heldout: int, seed: int, what: str
) -> tuple[list[RowT], list[RowT]]:
    """As `split`, where a group is on one side. A held-out group gives one row, so that rows that are scored are
    independent of each other, as the bootstrap takes them to be. Raises InvalidArgument."""
    ordered = sorted(groups, key=lambda group: hashlib.sha256(f"{seed}\n{group}".encode()).digest())
    heldout = [shuffled(groups[group], seed)[0] for group in ordered[:n_heldout]]
    train = shuffled((row for group in ordered[n_heldout:] for row in groups[group]), seed)
    if n_train < 0 or n_heldout < 0 or len(heldout) < n_heldout or len(train) < n_train:
        rows = sum(map(len, groups.values()))
        raise _too_few(n_train, n_heldout, f"{rows} {what} in {len(groups)} groups, of which none may be on both sides")
    return train[:n_train], heldout


def zipped_lines(archive: Path, member: str) -> list[dict[str, Any]]:
    """The JSON objects of a JSONL file inside a wheel, which is not unpacked. Raises FailedPrecondition."""
    try:
        with zipfile.ZipFile(archive) as files:
            return [json.loads(line) for line in files.read(member).decode().splitlines() if line.strip()]
    except FileNotFoundError:
        raise missing(archive) from None
    except (zipfile.BadZipFile, KeyError, ValueError, OSError) as error:
        raise damaged(archive, error) from error


def missing(archive: Path) -> FailedPrecondition:
    """A package that was not fetched."""
    return FailedPrecondition(f"{archive} does not exist. `make showcase-…` fetches it.", reason="SAMPLE_MISSING")


def damaged(archive: Path, error: Exception) -> FailedPrecondition:
    """A package that holds something else than is expected of it."""
    return FailedPrecondition(
        f"{archive} cannot be read ({error}). Delete it, then run the showcase again.", reason="SAMPLE_DAMAGED"
    )


def _too_few(n_train: int, n_heldout: int, there: str) -> InvalidArgument:
    return InvalidArgument(
        f"{n_train} training and {n_heldout} held-out rows were asked for; there are {there}.",
        reason="SAMPLE_TOO_SMALL",
    )
