"""Held-out rows, chosen by their content."""

import json
from pathlib import Path
from typing import Any

import pytest

from graft.data.prepare import prepare
from graft.data.split import Split, heldout
from graft.domain.errors import InvalidArgument
from graft.domain.jobs import OverLengthPolicy
from graft.domain.resources import DatasetFormat

KNOWN = [1, 5, 8, 19, 25]
"""The first rows that are held out at a tenth."""
ROWS = [{"prompt": f"question {number}", "completion": "yes"} for number in range(2000)]


class Bytes:
    """A tokenizer of bytes."""

    eos_token_id = 0

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:  # noqa: ARG002
        return list(text.encode())

    def apply_chat_template(self, *_: Any, **__: Any) -> str:
        raise NotImplementedError


def test_about_the_fraction_is_held_out_and_always_the_same_rows() -> None:
    chosen = [heldout(row, 0.1) for row in ROWS]
    assert 150 < sum(chosen) < 250
    assert chosen == [heldout(row, 0.1) for row in ROWS]
    assert chosen != [heldout(row, 0.1, seed=1) for row in ROWS]
    # What is known now is known later: a data set must not be cut anew by another version.
    assert [number for number, held in enumerate(chosen) if held][:5] == KNOWN


def test_equal_rows_fall_on_one_side_however_they_are_written() -> None:
    for row in ROWS[:200]:
        turned = dict(reversed(row.items()))
        spaced = json.dumps(turned, indent=2, ensure_ascii=True).encode()
        assert heldout(row, 0.5) == heldout(turned, 0.5) == heldout(spaced, 0.5)


def test_a_larger_fraction_holds_out_all_that_a_smaller_one_does() -> None:
    assert all(heldout(row, 0.3) for row in ROWS if heldout(row, 0.1))


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, float("nan")])
def test_a_fraction_that_cuts_nothing_is_refused(fraction: float) -> None:
    with pytest.raises(InvalidArgument, match="validation_fraction"):
        Split(fraction, held_out=True)


def test_both_sides_of_a_split_make_up_the_data_set(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:100]))

    def examples(split: Split | None) -> list[Any]:
        layout = DatasetFormat.PROMPT_COMPLETION
        return list(prepare(path, layout, Bytes(), 100, OverLengthPolicy.FAIL, split).examples)

    kept, held = examples(Split(0.2, held_out=False)), examples(Split(0.2, held_out=True))
    assert len(kept) + len(held) == len(examples(None)) == 100
    assert len(held) == sum(heldout(row, 0.2) for row in ROWS[:100])
    assert not {bytes(one.token_ids) for one in kept} & {bytes(one.token_ids) for one in held}
    with pytest.raises(InvalidArgument, match="No row is held out") as caught:
        examples(Split(1e-9, held_out=True))
    assert caught.value.reason == "NO_EXAMPLES"


def test_rows_over_length_are_named_by_their_place_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:100]))
    split = Split(0.2, held_out=True)
    with pytest.raises(InvalidArgument) as caught:
        prepare(path, DatasetFormat.PROMPT_COMPLETION, Bytes(), 5, OverLengthPolicy.FAIL, split)
    places = [f"row {number}" for number, row in enumerate(ROWS[:100], start=1) if split.takes(row)]
    assert [fault.field for fault in caught.value.violations] == places[:20]
