import hashlib
import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.data.formats import FileReport, FileValidator, validate_file
from graft.data.reading import MAX_ROW_BYTES, read_rows
from graft.domain.errors import InvalidArgument
from graft.domain.resources import DatasetFormat

CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
PAIR = {"prompt": "p", "completion": "c"}


def _validate(content: bytes, chunk_bytes: int = 7) -> FileReport:
    validator = FileValidator()
    for start in range(0, len(content), chunk_bytes):
        validator.feed(content[start : start + chunk_bytes])
    return validator.finish()


def _faults(*rows: object) -> list[tuple[str, str]]:
    content = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()
    with pytest.raises(InvalidArgument) as caught:
        _validate(content)
    return [(violation.field, violation.description) for violation in caught.value.violations]


@pytest.mark.parametrize("row", [CHAT, PAIR])
@pytest.mark.parametrize("ending", ["\n", "\r\n", "", "\n\n"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_a_good_file_is_recognised_counted_and_hashed(row: dict[str, object], ending: str, start: str) -> None:
    content = (start + json.dumps(row) + "\n" + json.dumps(row, ensure_ascii=False) + ending).encode()
    report = _validate(content)
    assert report.format is (DatasetFormat.MESSAGES if row is CHAT else DatasetFormat.PROMPT_COMPLETION)
    assert report.row_count == 2
    assert report.digest == f"sha256:{hashlib.sha256(content).hexdigest()}"


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 5, 10_000])
def test_the_size_is_the_files_whatever_the_chunks(start: bytes, chunk_bytes: int) -> None:
    content = start + json.dumps(PAIR).encode() + b"\n"
    assert _validate(content, chunk_bytes).size_bytes == len(content)


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        ("{", "line 1", "not JSON"),
        ("[]", "line 1", "not a JSON object"),
        ('{"page": "x"}', "line 1", "its keys: page"),
        ('{"prompt": "a", "prompt": "b", "completion": "c"}', "line 1: prompt", "twice"),
        ({"prompt": "a"}, "line 1: completion", "missing"),
        ({"prompt": 1, "completion": "c"}, "line 1: prompt", "not a string"),
        ({"prompt": "", "completion": " "}, "line 1: completion", "empty"),
        ({**PAIR, "label": 1}, "line 1: label", "known key"),
        ({"messages": []}, "line 1: messages", "at least one"),
        ({"messages": [{"role": "user", "content": "q"}]}, "line 1: messages", "no assistant"),
        ({"messages": [{"role": "robot", "content": "q"}]}, "line 1: messages[0].role", "'robot'"),
        ({"messages": [{"role": "assistant", "content": None}]}, "line 1: messages[0].content", "not a string"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": 2}]}, "line 1: messages[0].weight", "0 or 1"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": 0}]}, "line 1: messages", "no assistant"),
        ('{"prompt": ' + "1" * 5000 + ', "completion": "c"}', "line 1", "too many digits"),
        ('{"prompt": "\\ud800", "completion": "c"}', "line 1: prompt", "surrogate"),
        ({"messages": [{"role": "assistant", "content": "a\udc00"}]}, "line 1: messages[0].content", "character 1"),
        ('{"\\ud800": 1}', "line 1", "its keys: ?"),
        ({**PAIR, "k" * 9000: 1}, "line 1: " + "k" * 80, "known key"),
        ({"messages": [*CHAT["messages"], {"role": "system", "content": "s"}]}, "line 1: messages[2].role", "first"),
    ],
)
def test_a_bad_row_is_told_with_line_field_and_reason(row: object, field: str, reason: str) -> None:
    ((where, why),) = _faults(row)
    assert where == field
    assert reason in why


def test_bytes_that_are_not_utf8_are_told_with_their_place() -> None:
    with pytest.raises(InvalidArgument) as caught:
        _validate(b'{"prompt": "\xff", "completion": "c"}\n')
    assert caught.value.violations[0].description == "is not UTF-8 (byte 12)"


def test_every_bad_line_is_counted_and_the_first_twenty_reported() -> None:
    content = (json.dumps(PAIR) + "\n").encode() + b"nonsense\n" * 25
    with pytest.raises(InvalidArgument) as caught:
        _validate(content)
    assert caught.value.metadata["bad_lines"] == "25"
    assert [violation.field for violation in caught.value.violations] == [f"line {n}" for n in range(2, 22)]
    assert caught.value.message.startswith("25 of 26 lines are bad; nothing was stored.")


def test_two_layouts_in_one_file_are_refused() -> None:
    assert _faults(PAIR, CHAT) == [("line 2", "is a messages row in a prompt_completion file; one file has one layout")]


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(content: bytes) -> None:
    with pytest.raises(InvalidArgument, match="no rows"):
        _validate(content)


def test_an_endless_line_is_one_bad_line_in_bounded_memory() -> None:
    validator = FileValidator()
    for _ in range(8):
        validator.feed(b"{" * MAX_ROW_BYTES)
        assert len(validator._jsonl._rest) <= MAX_ROW_BYTES
    validator.feed(b"\n" + json.dumps(PAIR).encode() + b"\n")
    with pytest.raises(InvalidArgument) as caught:
        validator.finish()
    assert [violation.field for violation in caught.value.violations] == ["line 1"]


def test_a_long_line_in_single_bytes_takes_no_longer_for_its_length() -> None:
    content = json.dumps({"prompt": "x" * 400_000, "completion": "c"}).encode()
    started = time.process_time()
    assert _validate(content, 1).row_count == 1
    # 0.2 s here; copied at every byte it would be 80 GB, which takes ten and more.
    assert time.process_time() - started < 5


def test_a_file_on_disk_validates_and_reads_back(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\ufeff" + json.dumps({"prompt": "a\u2028b", "completion": "c"}, ensure_ascii=False) + "\r\n\n")
    assert validate_file(file).row_count == 1
    assert list(read_rows(file)) == [{"prompt": "a\u2028b", "completion": "c"}]


@given(st.binary(max_size=200), st.integers(1, 50))
def test_no_bytes_make_the_validator_fail_in_another_way(content: bytes, chunk_bytes: int) -> None:
    # Neither of its keys is a row's, so these bytes are refused for one reason or another, always as a bad data set.
    with pytest.raises(InvalidArgument) as caught:
        _validate(b'{"neither": 0}\n' + content, chunk_bytes)
    assert caught.value.reason == "BAD_DATASET"


@given(st.lists(st.text(max_size=20), min_size=1, max_size=5), st.integers(1, 30))
def test_any_text_survives_as_a_prompt(prompts: list[str], chunk_bytes: int) -> None:
    content = "".join(json.dumps({"prompt": prompt, "completion": "c"}) + "\n" for prompt in prompts).encode()
    assert _validate(content, chunk_bytes).row_count == len(prompts)
