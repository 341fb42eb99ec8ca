"""What a check of a data set finds, as a function and through `graft datasets validate`."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from graft.data.analysis import Base, analyse, default_tokens_per_second
from graft.data.canonical import Chat, canonical
from graft.data.formats import validate_file
from graft.data.rendering import render
from graft.data.tasks.catalog import builtin
from graft.data.tasks.rows import trained_as
from graft.domain.errors import InvalidArgument
from graft.domain.reports import DatasetReport, FoundRows, LabelCount, LengthBin
from graft.domain.resources import DatasetFormat as Format
from tests.support.command import Ran, graft
from tests.support.tiny_llama import make_tiny_llama
from tests.unit.test_split import Bytes

USER = {"role": "user", "content": "q"}
GOOD = {"role": "assistant", "content": "good"}
BAD = {"role": "assistant", "content": "bad"}


def pair(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def analysed(folder: Path, *rows: dict[str, Any], declared: Format | None = None, **options: Any) -> DatasetReport:
    path = written(folder / "rows", *rows)
    return analyse(path, validate_file(path, declared), **options)


def test_duplicates_conflicts_and_empty_rows_are_counted_and_named(tmp_path: Path) -> None:
    report = analysed(
        tmp_path,
        pair("one", "1"),
        pair("two", "2"),
        pair(" one\n", "1"),  # equal but for white space
        pair("two", "3"),
        pair(" ", "4"),
        pair("caf\u00e9", "5"),
        pair("cafe\u0301", "5"),
    )
    assert report.duplicates == FoundRows(2, (3, 7))
    assert report.conflicting == FoundRows(2, (2, 4))
    assert report.empty == FoundRows(1, (5,))


def test_the_first_five_rows_of_many_are_named(tmp_path: Path) -> None:
    assert analysed(tmp_path, *[pair("p", "c")] * 9).duplicates == FoundRows(8, (2, 3, 4, 5, 6))


def test_leakage_is_the_same_input_whatever_its_answer(tmp_path: Path) -> None:
    held_out = written(tmp_path / "held", pair("new", "x"), pair("one ", "other"), pair("two", "2"))
    report = analysed(
        tmp_path, pair("one", "1"), pair("two", "2"), held_out=(held_out, validate_file(held_out)), base=None
    )
    assert (report.held_out_row_count, report.leaked) == (3, FoundRows(2, (2, 3)))


def test_the_balance_of_labels_is_told_and_of_texts_is_not(tmp_path: Path) -> None:
    labelled = [pair(f"p{number}", "yes" if number % 4 else "no") for number in range(40)]
    assert analysed(tmp_path, *labelled).labels == (LabelCount("yes", 30), LabelCount("no", 10))
    assert analysed(tmp_path, *[pair(f"p{number}", f"c{number}") for number in range(40)]).labels == ()
    assert analysed(tmp_path, *[pair(f"p{number}", f"c{number % 60}") for number in range(200)]).labels == ()
    fields = [{"review": f"r{number}", "label": number % 2} for number in range(10)]
    assert analysed(tmp_path, *fields, declared=Format.FIELDS).labels == (LabelCount("0", 5), LabelCount("1", 5))
    chats = [{"messages": [{"role": "user", "content": f"{n}"}, GOOD]} for n in range(10)]
    assert analysed(tmp_path, *chats).labels == (LabelCount("good", 10),)


def test_tokens_lengths_and_time_are_by_the_base_models_tokenizer(tmp_path: Path) -> None:
    base = Base("bytes", Bytes(), 12, 270_000_000)
    # 4 + 1, 11 + 1 and 24 + 1 tokens.
    rows = [pair("pp", "cc"), pair("p" * 9, "cc"), pair("p" * 20, "cccc")]
    report = analysed(tmp_path, *rows, base=base, epochs=2)
    assert (report.tokens, report.learned_tokens, report.length_unit) == (5 + 12 + 25, 3 + 3 + 5, "tokens")
    assert (report.shortest, report.median, report.longest) == (5, 12, 25)
    assert report.over_length == FoundRows(1, (3,))
    assert [one for one in report.histogram if one.row_count] == [
        LengthBin(5, 10, 1),
        LengthBin(10, 15, 1),
        LengthBin(25, 30, 1),
    ]
    assert report.estimate is not None
    # What does not fit is not trained on; twice the parameters take twice the time.
    assert (report.estimate.tokens, report.estimate.tokens_per_second) == (17, 192.0)
    assert report.estimate.seconds == 17 * 2 / 192
    assert "270M" in report.estimate.basis
    given = analysed(tmp_path, *rows, base=base, tokens_per_second=17.0).estimate
    assert given is not None
    assert given.seconds == 1.0
    assert default_tokens_per_second(135_000_000) == 384


def test_every_format_is_measured(tmp_path: Path) -> None:
    base = Base("bytes", Bytes(), 100, 1000)
    assert analysed(tmp_path, {"text": "abc"}, base=base).tokens == 4
    preference = analysed(tmp_path, {"prompt": "p", "chosen": "a", "rejected": "bbb"}, base=base)
    assert (preference.tokens, preference.longest, preference.learned_tokens) == (3 + 5, 5, 2 + 4)
    graded = analysed(tmp_path, {"prompt": "1+1", "answer": 2}, base=base)
    assert (graded.tokens, graded.learned_tokens, graded.estimate) == (3, 0, None)
    assert "reinforcement" in graded.notes[0]
    fields = analysed(tmp_path, {"a": "b"}, declared=Format.FIELDS, base=base)
    assert (fields.tokens, fields.length_unit) == (None, "characters")
    for row in (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"question": "q", "answer": "a"},
        {"instruction": "i", "output": "o"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    ):
        assert analysed(tmp_path, row).longest > 0


class Chatty(Bytes):
    """A turn is its role's letter, its text and a line's end."""

    def apply_chat_template(self, conversation: Any, *_: Any, add_generation_prompt: bool, **__: Any) -> str:
        told = "".join(f"{turn['role'][0]}{turn['content']}\n" for turn in conversation)
        return told + "a" * add_generation_prompt


def review(text: str, sentiment: str, **others: int) -> dict[str, Any]:
    return {"review": text, "sentiment": sentiment, **others}


def test_rows_of_fields_are_measured_as_their_task_renders_them(tmp_path: Path) -> None:
    base = Base("bytes", Chatty(), 200, 135_000_000)
    rows = [
        review("A joy.", "positive", id=1),
        review(" A joy. ", "positive", id=2),  # a field that the task does not read makes no other row of it
        review("A joy.", "negative", id=3),
        review("Warm.", "splendid", id=4),  # no label of the task
        review("A bore. " * 30, "negative", id=5),
        review(" ", "negative", id=6),
    ]
    report = analysed(tmp_path, *rows, declared=Format.FIELDS, base=base, task=builtin("sentiment"))
    task = builtin("sentiment")
    lengths, learned = [], 0
    for number in (0, 1, 2, 4):
        shape = canonical(*trained_as(task, rows[number], Format.FIELDS))
        assert isinstance(shape, Chat)
        example = render(shape, Chatty())
        lengths.append(len(example.token_ids))
        learned += sum(example.loss_mask)
    assert (report.task, report.length_unit, report.tokens) == ("sentiment", "tokens", sum(lengths))
    assert (report.shortest, report.longest) == (min(lengths), max(lengths))
    assert report.learned_tokens == learned >= 4 * len("positive")
    assert report.over_length == FoundRows(1, (5,))
    assert report.duplicates == FoundRows(1, (2,))
    assert report.conflicting == FoundRows(3, (1, 2, 3))
    assert (report.unusable, report.empty) == (FoundRows(2, (4, 6)), FoundRows(1, (6,)))
    assert report.notes[0].startswith("Row 4: sentiment: 'splendid' is no label of the task")
    assert report.labels == (LabelCount("negative", 3), LabelCount("positive", 2), LabelCount("splendid", 1))
    assert report.estimate is not None
    assert report.estimate.tokens == sum(lengths[:3])
    untold = analysed(tmp_path, *rows, declared=Format.FIELDS, base=base)
    assert (untold.task, untold.tokens, untold.unusable) == ("", None, None)
    assert "name the task" in untold.notes[0]


def test_a_task_takes_its_labels_from_the_data_and_its_inputs_are_looked_for_in_held_out_rows(tmp_path: Path) -> None:
    task = builtin("text-classification")
    rows = [{"text": f"t{number}", "label": "ab"[number % 2], "id": number} for number in range(6)]
    held_out = written(tmp_path / "held", {"text": "t1", "label": "a", "id": 99}, {"text": "new", "label": "b"})
    other = (held_out, validate_file(held_out, Format.FIELDS))
    base = Base("bytes", Chatty(), 500, 1000)
    report = analysed(tmp_path, *rows, declared=Format.FIELDS, base=base, task=task, held_out=other)
    assert (report.unusable, report.leaked) == (FoundRows(0), FoundRows(1, (1,)))
    assert report.labels == (LabelCount("a", 3), LabelCount("b", 3))
    with pytest.raises(InvalidArgument) as few:
        analysed(tmp_path, rows[0], declared=Format.FIELDS, task=task)
    assert few.value.reason == "INVALID_LABELS"


def test_a_task_is_refused_for_rows_that_hold_their_prompt_and_learns_whole_chats_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="hold their prompt already") as unfit:
        analysed(tmp_path, pair("p", "c"), task=builtin("sentiment"))
    assert unfit.value.reason == "TASK_UNFIT"
    base = Base("bytes", Chatty(), 500, 1000)
    chats = analysed(tmp_path, {"messages": [USER, GOOD]}, base=base, task=builtin("chat"))
    assert chats.tokens == analysed(tmp_path, {"messages": [USER, GOOD]}, base=base).tokens
    asked = {"question": "q", "answer": "a"}
    answered = analysed(tmp_path, asked, base=base, task=builtin("question-answering"))
    assert (answered.task, answered.tokens is not None) == ("question-answering", True)


def test_rows_that_the_chat_template_refuses_are_counted_and_the_first_told(tmp_path: Path) -> None:
    class Refusing(Bytes):
        def apply_chat_template(self, *_: Any, **__: Any) -> str:
            raise ValueError("no chats")

    report = analysed(
        tmp_path, {"messages": [USER, GOOD]}, {"messages": [USER, BAD]}, base=Base("bytes", Refusing(), 100, 1000)
    )
    assert report.unusable == FoundRows(2, (1, 2))
    assert report.tokens == 0
    assert report.notes[0].startswith("Row 1: The base model's chat template refuses")


MEASURE = """
import sys
from pathlib import Path
from graft.data.analysis import analyse
from graft.data.formats import validate_file

def status(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])

path = Path(sys.argv[1])
before = status("VmRSS")
report = analyse(path, validate_file(path))
print(report.row_count, report.duplicates.count, (status("VmHWM") - before) // 1024)
"""


def test_a_large_file_is_measured_without_holding_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    text = "word " * 4000
    with open(path, "w") as file:
        file.writelines(json.dumps({"text": f"{number % 1500} {text}"}) + "\n" for number in range(2000))
    ended = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stderr
    rows, duplicates, used_mib = map(int, ended.stdout.split())
    assert (rows, duplicates) == (2000, 500)
    assert path.stat().st_size > 40_000_000
    assert used_mib < 20


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    folder = make_tiny_llama(tmp_path_factory.mktemp("tiny"))
    (home / "base_models.yaml").write_text(f"tiny: {{folder: {folder}, license: MIT}}\n")
    return home


async def validate(home: Path, *arguments: str | Path) -> Ran:
    return await graft("datasets", "validate", *arguments, GRAFT_HOME=home)


async def test_the_command_shows_tokens_bars_leakage_balance_and_time(tmp_path: Path, home: Path) -> None:
    rows = written(tmp_path / "rows", *[pair(f"film {number}", "yes" if number % 4 else "no") for number in range(40)])
    held_out = written(tmp_path / "held", pair("film 1", "yes"), pair("film 99", "no"))
    options = ("--base-model", "tiny", "--held-out", held_out, "--context-tokens", "10", "--tokens-per-second", "10")
    ran = await validate(home, rows, *options)
    assert ran.code == 0, ran.err
    told = {line.split("  ")[0]: line.split("  ")[-1].strip() for line in ran.out.splitlines() if "  " in line}
    assert told["format"] == "prompt_completion"
    assert told["tokens"] == "420 by tiny, 150 of them learned"
    assert told["over 10 tokens"] == "23 (rows 11, 12, 14, 15, 16 …)"
    assert told["of them also trained on"] == "1 (row 1)"
    assert told["time to train"].startswith("17 s for 1 epoch")
    assert "  yes  30  " + "█" * 40 in ran.out
    assert "   no  10  " + "█" * 13 in ran.out

    as_json = (await validate(home, rows, *options, "--json")).json
    assert (as_json["tokens"], as_json["leaked"]) == (420, {"count": 1, "first_rows": [1]})
    assert sum(one["row_count"] for one in as_json["histogram"]) == 40


async def test_the_command_counts_rows_of_fields_through_a_task_or_its_file(tmp_path: Path, home: Path) -> None:
    rows = written(tmp_path / "rows", *[review(f"film {n}", "positive" if n % 4 else "negative") for n in range(40)])
    options = ("--base-model", "tiny", "--format", "fields", "--task")
    ran = await validate(home, rows, *options, "sentiment")
    assert ran.code == 0, ran.err
    told = {line.split("  ")[0]: line.split("  ")[-1].strip() for line in ran.out.splitlines() if "  " in line}
    assert told["task"] == "sentiment"
    assert "by tiny" in told["tokens"]
    assert "  positive  30  " in ran.out
    own = tmp_path / "own.yaml"
    own.write_text(builtin("sentiment").to_text())
    as_json = (await validate(home, rows, *options, own, "--json")).json
    assert told["tokens"].startswith(f"{as_json['tokens']:,} by tiny, {as_json['learned_tokens']:,} of them")
    assert (await validate(home, rows, *options, "nope")).code == 3


async def test_without_a_converted_base_the_command_tells_all_but_tokens_and_what_to_do(
    tmp_path: Path, home: Path
) -> None:
    rows = written(tmp_path / "rows", pair("one", "1"), pair("one", "2"))
    ran = await validate(home, rows)
    assert ran.code == 0
    assert "2 (rows 1, 2)" in ran.out
    assert "No tokens were counted" in ran.out
    unknown = await validate(home, rows, "--base-model", "nope")
    assert unknown.code == 3
    assert "tiny" in unknown.err


async def test_files_that_are_bad_or_ambiguous_or_absent_end_the_command_with_2(tmp_path: Path, home: Path) -> None:
    bad = written(tmp_path / "bad", pair("p", " "))
    ambiguous = written(tmp_path / "two", {"text": "t", "label": 1})
    ran = await validate(home, bad)
    assert (ran.code, "line 1: completion" in ran.err) == (2, True)
    ran = await validate(home, ambiguous, "--json")
    assert (ran.code, ran.error["reason"]) == (2, "AMBIGUOUS_DATASET")
    assert (await validate(home, ambiguous, "--format", "text", "--json")).json["ignored_fields"] == ["label"]
    assert (await validate(home, tmp_path / "absent")).code == 2
    assert "xml" in (await validate(home, ambiguous, "--format", "xml")).err
