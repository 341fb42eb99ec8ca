"""CSV and Parquet files: recognised by content, read in bounded memory, faults told by row and column."""

import csv
import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from graft.data.formats import validate_file
from graft.data.reading import Container, container_of, read_rows
from graft.domain.errors import InvalidArgument
from graft.domain.resources import DatasetFormat as Format


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "data"  # no ending: the content tells
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def parquet(folder: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    import pyarrow as pa
    from pyarrow import parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), folder / "data", **options)
    return folder / "data"


def faults(path: Path, declared: Format | None = None) -> list[tuple[str, str]]:
    with pytest.raises(InvalidArgument) as caught:
        validate_file(path, declared)
    return [(fault.field, fault.description) for fault in caught.value.violations]


@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_csv_is_recognised_validated_and_read_back(tmp_path: Path, start: str, ending: str) -> None:
    lines = ["prompt,completion", '"a ""quoted"", one",yes', "", '"two\nlines",né']
    content = start + ending.join(lines)
    path = written(tmp_path, content)
    report = validate_file(path)
    assert (report.container, report.format, report.row_count) == (Container.CSV, Format.PROMPT_COMPLETION, 2)
    assert report.digest == f"sha256:{hashlib.sha256(content.encode()).hexdigest()}"
    assert list(read_rows(path)) == [
        {"prompt": 'a "quoted", one', "completion": "yes"},
        {"prompt": "two\nlines", "completion": "né"},
    ]


def test_cells_may_hold_messages_and_empty_optional_cells_are_none(tmp_path: Path) -> None:
    chat = '[{""role"": ""user"", ""content"": ""q""}, {""role"": ""assistant"", ""content"": ""a""}]'
    assert validate_file(written(tmp_path, f'messages\n"{chat}"\n')).format is Format.MESSAGES
    # JSON to learn from is a text like any other.
    for text in ('{""a"": 1}', '[{""a"": 1}]', "[{", '{""messages"": 1}'):
        path = written(tmp_path, f'prompt,completion\n"{text}","{text}"\n')
        assert validate_file(path).format is Format.PROMPT_COMPLETION
        assert next(iter(read_rows(path)))["prompt"] == text.replace('""', '"')
    path = written(tmp_path, "question,context,answer\nq,,a\n")
    assert list(read_rows(path)) == [{"question": "q", "answer": "a"}]


@pytest.mark.parametrize(
    ("content", "field", "reason"),
    [
        ("prompt,completion\na\n", "row 1", "1 columns where the header has 2"),
        ("prompt,completion\na,b\nc,\n", "row 2: completion", "nothing to learn"),
        (b"prompt,completion\nb,c\na,\xff\n", "row 2: completion", "not UTF-8"),
        ('prompt,completion\n"a"b,c\n', "row 1", "is not CSV"),
        ('prompt,completion\n"a,c\n', "row 1", "unexpected end of data"),
        ("prompt,prompt\na,b\n", "file", "twice"),
        ("prompt,\na,b\n", "file", "without a name"),
        ("prompt;completion\na;b\n", "file", "semicolons"),
        ("prompt,completion\n", "line 1", "no rows"),
        ("colour,shape\nred,round\n", "row 1", "its keys: colour, shape"),
        (b"\x1f\x8b\x08\x00", "file", "neither JSONL, CSV nor Parquet"),
        (b"PAR1 cut short", "file", "damaged"),
    ],
)
def test_a_bad_csv_or_unknown_file_is_told_with_row_and_column(
    tmp_path: Path, content: str | bytes, field: str, reason: str
) -> None:
    (where, why), *_ = faults(written(tmp_path, content))
    assert where == field
    assert reason in why


def test_an_unclosed_quotation_mark_ends_the_reading_and_says_so(tmp_path: Path) -> None:
    content = 'prompt,completion\na,b\n"c,d\n' + "e,f\n" * 300_000
    ((where, why),) = faults(written(tmp_path, content))
    assert where == "row 2"
    assert "quotation mark" in why


def test_csv_that_is_ambiguous_names_its_candidates(tmp_path: Path) -> None:
    path = written(tmp_path, "text,label\ngood,1\n")
    with pytest.raises(InvalidArgument, match=r"row 1 may be text .*`label`.* or fields") as caught:
        validate_file(path)
    assert caught.value.reason == "AMBIGUOUS_DATASET"
    assert validate_file(path, Format.FIELDS).format is Format.FIELDS


def test_parquet_is_recognised_and_read_back_without_its_nulls(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    ]
    rows[0]["messages"].append({"role": "assistant", "content": "b"})
    path = parquet(tmp_path, rows)
    report = validate_file(path)
    assert (report.container, report.format, report.row_count) == (Container.PARQUET, Format.MESSAGES, 2)
    assert list(read_rows(path)) == rows


def test_a_bad_parquet_row_is_told_with_row_and_column(tmp_path: Path) -> None:
    assert faults(parquet(tmp_path, [{"text": "a"}, {"text": ""}]))[0][0] == "row 2: text"
    assert faults(parquet(tmp_path, [{"text": 1}])) == [("row 1: text", "is not a string")]


@pytest.mark.parametrize(
    ("head", "container"),
    [
        (b"", Container.JSONL),
        (b'\xef\xbb\xbf {"a"', Container.JSONL),
        (b"PAR1\x15", Container.PARQUET),
        (b"a,b\n", Container.CSV),
        ("né".encode() + b"\xc3", Container.CSV),
        (b"\x89PNG\r\n\x1a\n\0", None),
    ],
)
def test_a_file_is_told_by_its_first_bytes(head: bytes, container: Container | None) -> None:
    assert container_of(head) is container


MEASURE = """
import sys
from pathlib import Path
from graft.data.formats import validate_file
from graft.data.reading import read_rows
import pyarrow, pyarrow.parquet

def status(name):  # in kB; the peak is this program's own, unlike getrusage's, which remembers what started it
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])

before = status("VmRSS")
report = validate_file(Path(sys.argv[1]))
assert sum(1 for _ in read_rows(Path(sys.argv[1]))) == report.row_count
print(report.container, (status("VmHWM") - before) // 1024)
"""
BIG_BYTES = 60_000_000


def _big(folder: Path, container: Container) -> Path:
    path = folder / "big"
    text = "word " * 400
    if container is Container.JSONL:
        path.write_text(f'{{"text": "{text}"}}\n' * (BIG_BYTES // len(text)))
    elif container is Container.CSV:
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text"])
            writer.writerows([text] for _ in range(BIG_BYTES // len(text)))
    else:
        import pyarrow as pa
        from pyarrow import parquet as pq

        # One row group, uncompressed, without a dictionary: the hardest to read piece by piece.
        table = pa.table({"text": [text] * (BIG_BYTES // len(text))})
        pq.write_table(table, path, row_group_size=10**6, compression="none", use_dictionary=False)
    return path


@pytest.mark.parametrize("container", list(Container))
def test_a_file_of_60_mb_is_validated_and_read_in_memory_that_does_not_hold_it(
    tmp_path: Path, container: Container
) -> None:
    path = _big(tmp_path, container)
    assert path.stat().st_size > 0.99 * BIG_BYTES
    ended = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stderr
    told, used_mib = ended.stdout.split()
    assert told == container
    assert int(used_mib) < 45


def test_a_header_of_a_hundred_thousand_columns_is_read(tmp_path: Path) -> None:
    path = tmp_path / "wide.csv"
    path.write_text(",".join(map(str, range(100_000))) + "\n" + "1," * 99_999 + "1\n")
    (row,) = read_rows(path)  # compared each with each they would take minutes
    assert len(row) == 100_000
