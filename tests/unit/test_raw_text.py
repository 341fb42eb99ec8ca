from collections.abc import Iterator
from pathlib import Path

import pytest

from graft.data.prepare import Example
from graft.data.raw_text import read_documents, sequences
from graft.domain.errors import InvalidArgument


class Letters:
    """A token a letter."""

    eos_token_id = 0

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        return [ord(letter) for letter in text]

    def apply_chat_template(self, *_: object, **__: object) -> str:
        raise AssertionError


def test_a_sequence_is_of_one_document_and_its_end_token_is_in_the_last() -> None:
    learned, held_out = sequences(["abcdefg", "xyz"], Letters(), 4, 10**6, 100)
    whole = sorted("".join(map(chr, example.token_ids)) for example in [*learned, *held_out])
    assert whole == ["abcd", "efg\0", "xyz\0"]
    assert all(all(example.loss_mask) for example in learned)


def test_what_is_held_out_is_never_learned_and_does_not_depend_on_the_order() -> None:
    documents = [f"document number {number}" for number in range(300)]
    learned, held_out = sequences([*documents, *documents], Letters(), 64, 10**6, 100)
    assert 5 <= len(held_out) <= 30
    assert len(learned) + len(held_out) == 300
    assert sequences(reversed(documents), Letters(), 64, 10**6, 100) == (learned, held_out)


def test_no_document_is_on_both_sides() -> None:
    documents = ["".join(f"{number:03}-{piece:03}." for piece in range(8)) for number in range(200)]
    learned, held_out = (
        {_text(piece)[:3] for piece in side} for side in sequences(documents, Letters(), 8, 10**6, 1000)
    )
    assert learned & held_out == set()
    assert len(learned | held_out) == 200
    assert held_out


def test_two_documents_are_enough_to_hold_one_out_and_one_is_split() -> None:
    learned, held_out = sequences(["a" * 4 + "b" * 4, "c" * 4 + "d" * 4], Letters(), 4, 10**6, 100)
    assert {tuple(sorted(map(_text, side))) for side in (learned, held_out)} == {("aaaa", "bbbb"), ("cccc", "dddd")}
    learned, held_out = sequences(["a" * 4 + "b" * 4, "c" * 4 + "d" * 4], Letters(), 4, 1, 100)
    assert [sorted(map(_text, side)) for side in (learned, held_out)] == [["aaaa", "bbbb"], ["cccc", "dddd"]]
    learned, held_out = sequences(["".join(map(chr, range(1, 2001)))], Letters(), 4, 10**6, 100)
    assert 5 <= len(held_out) <= 60


def test_fewer_tokens_to_learn_do_not_mean_fewer_to_measure_on() -> None:
    documents = [f"document number {number}" for number in range(300)]
    _, all_held_out = sequences(documents, Letters(), 64, 10**6, 8)
    learned, held_out = sequences(documents, Letters(), 64, 30, 8)
    assert (len(learned), len(held_out)) == (2, 8)
    assert len(all_held_out) == 8


def test_no_more_is_read_than_is_asked_for() -> None:
    def documents() -> Iterator[str]:
        for number in range(1000):
            yield f"document number {number}"
        raise AssertionError("read on")

    learned, held_out = sequences(documents(), Letters(), 10, 100, 3)
    assert learned
    assert len(held_out) == 3


def test_a_large_text_is_read_in_parts_that_end_with_a_line(tmp_path: Path) -> None:
    text = "".join(f"line {number}\n" for number in range(10_000))
    (tmp_path / "a.txt").write_text(text)
    parts = list(read_documents(tmp_path / "a.txt"))
    assert len(parts) > 4
    assert all(part.endswith("\n") for part in parts)
    assert "".join(parts) == text


def _text(example: Example) -> str:
    return "".join(map(chr, example.token_ids))


def test_files_are_read_and_a_wrong_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    assert list(read_documents(tmp_path / "a.txt")) == ["one\ntwo\n"]
    rows = tmp_path / "a.jsonl"
    rows.write_text('{"text": "one"}\n\n{"text": 2}\n')
    with pytest.raises(InvalidArgument, match=r"a\.jsonl, line 3: needs a JSON object with a `text`"):
        list(read_documents(rows))
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidArgument, match="not UTF-8"):
        list(read_documents(tmp_path / "b.txt"))
    with pytest.raises(InvalidArgument, match="cannot be read"):
        list(read_documents(tmp_path / "absent.txt"))
