import io
import json
import tarfile
from pathlib import Path

import pytest

from graft.data import samples
from graft.data.formats import validate_file
from graft.domain.errors import FailedPrecondition, InvalidArgument
from graft.domain.resources import DatasetFormat


def _tar(path: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        member = tarfile.TarInfo(path)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def _archive(folder: Path, lines: list[tuple[int, str]]) -> Path:
    text = "".join(f"{number}\t0.5\t{review}\r\n" for number, review in lines).encode()
    path = folder / "reviews.tar.gz"
    inner = _tar("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt", text)
    path.write_bytes(_tar("package-1/additional_resources/hutto_ICWSM_2014.tar.gz", inner))
    return path


def _question(row: samples.Row) -> str:
    return row["messages"][1]["content"]


def test_reviews_are_balanced_and_none_is_in_both_parts() -> None:
    sample = samples.reviews(400, 301)
    for rows, positives in ((sample.train, 200), (sample.heldout, 151)):
        answers = [samples.answer(row) for row in rows]
        assert answers.count("positive") == positives
        assert answers.count("negative") == len(rows) - positives
    keys = [samples.text_key(_question(row)) for row in (*sample.train, *sample.heldout)]
    assert len(set(keys)) == len(keys) == 701


def test_held_out_rows_depend_on_the_seed_and_not_on_how_many_are_trained_on() -> None:
    first = samples.reviews(100, 50)
    assert samples.reviews(100, 50) == first
    assert samples.reviews(500, 50).heldout == first.heldout
    assert samples.reviews(100, 50, seed=1).heldout != first.heldout


def test_repeated_and_disputed_reviews_are_left_out(tmp_path: Path) -> None:
    lines = [(1, "Great."), (2, "great!"), (3, "Odd"), (5153, "Odd."), (5154, "Bad."), (10313, "Unlabelled.")]
    sample = samples.reviews(2, 0, archive=_archive(tmp_path, lines))
    assert sorted((_question(row), samples.answer(row)) for row in sample.train) == [
        ("Bad.", "negative"),
        ("Great.", "positive"),
    ]
    with pytest.raises(InvalidArgument, match="there are 1 positive reviews"):
        samples.reviews(4, 0, archive=_archive(tmp_path, lines))


def test_missing_and_damaged_reviews_are_told_with_the_fix(tmp_path: Path) -> None:
    absent = tmp_path / "absent.tar.gz"
    with pytest.raises(FailedPrecondition, match="make setup"):
        samples.reviews(1, 1, archive=absent)
    absent.write_bytes(b"no archive")
    with pytest.raises(FailedPrecondition, match="Delete it"):
        samples.reviews(1, 1, archive=absent)
    absent.write_bytes(_archive(tmp_path, [(1, "Great.")]).read_bytes()[:150])
    with pytest.raises(FailedPrecondition, match="Delete it"):
        samples.reviews(1, 1, archive=absent)


def test_docstrings_are_not_in_their_functions_and_not_in_both_parts() -> None:
    sample = samples.docstrings(300, 100)
    assert (len(sample.train), len(sample.heldout), sample.labels) == (300, 100, ())
    answers = [samples.answer(row) for row in (*sample.train, *sample.heldout)]
    questions = [_question(row) for row in (*sample.train, *sample.heldout)]
    assert len(set(answers)) == len(set(questions)) == 400
    for question, answer in zip(questions, answers, strict=True):
        assert question.startswith("def ")
        assert len(question) <= samples.MAX_SOURCE_CHARACTERS
        assert answer not in question
    assert samples.docstrings(50, 100).heldout == sample.heldout


def test_prompts_end_with_the_row_s_question_and_hold_no_answer_to_it() -> None:
    sample = samples.reviews(20, 2)
    row = sample.heldout[0]
    assert [turn["role"] for turn in samples.zero_shot(row)] == ["system", "user"]
    shots = samples.choose_shots(sample, 4)
    assert sorted(map(samples.answer, shots)) == ["negative", "negative", "positive", "positive"]
    chat = samples.few_shot(row, shots)
    assert [turn["role"] for turn in chat] == ["system", *["user", "assistant"] * 4, "user"]
    assert chat[-1] == row["messages"][1]
    assert len(samples.choose_shots(samples.docstrings(20, 2), 4)) == 4


def test_written_rows_are_a_valid_data_set(tmp_path: Path) -> None:
    for sample in (samples.reviews(30, 5), samples.docstrings(30, 5)):
        path = samples.write_rows(sample.train, tmp_path / f"{sample.name}.jsonl")
        report = validate_file(path)
        assert (report.format, report.row_count) == (DatasetFormat.MESSAGES, 30)
        assert json.loads(path.read_text().splitlines()[0]) == sample.train[0]
