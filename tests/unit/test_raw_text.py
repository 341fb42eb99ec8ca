from pathlib import Path

import pytest

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
    learned, held_out = sequences(["abcdefg", "xyz"], Letters(), 4, 10**6)
    whole = sorted("".join(map(chr, example.token_ids)) for example in [*learned, *held_out])
    assert whole == ["abcd", "efg\0", "xyz\0"]
    assert all(all(example.loss_mask) for example in learned)


def test_what_is_held_out_is_never_learned_and_does_not_depend_on_the_order() -> None:
    documents = [f"document number {number}" for number in range(300)]
    learned, held_out = sequences([*documents, *documents], Letters(), 64, 10**6)
    assert 5 <= len(held_out) <= 30
    assert len(learned) + len(held_out) == 300
    assert sequences(reversed(documents), Letters(), 64, 10**6) == (learned, held_out)


def test_no_more_is_read_than_is_asked_for() -> None:
    def documents() -> object:
        yield "a" * 100
        yield "b" * 100
        raise AssertionError("read on")

    learned, _ = sequences(documents(), Letters(), 10, 12)  # type: ignore[arg-type]
    assert learned


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
