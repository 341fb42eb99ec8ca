"""`graft tasks`: definitions listed, shown, written and tried on rows, without a stack."""

import asyncio
import json
from pathlib import Path

from graft.data.tasks import catalog
from graft.data.tasks.definition import load
from tests.support.command import graft

ROWS = 'review,sentiment,year\n"A joy, all of it.",positive,1950\nDull.,negative,1951\n'


async def test_tasks_are_listed_and_shown_as_text_and_as_json() -> None:
    listed, listed_json, shown, shown_json, unknown = await asyncio.gather(
        graft("tasks", "list"),
        graft("tasks", "list", "--json"),
        graft("tasks", "show", "sentiment"),
        graft("tasks", "show", "sentiment", "--json"),
        graft("tasks", "show", "sentment"),
    )
    assert "question, context?" in listed.out
    assert [one["name"] for one in listed_json.json] == list(catalog.names())
    assert load(shown.out) == catalog.builtin("sentiment")
    assert shown_json.json["digest"] == catalog.builtin("sentiment").digest
    assert unknown.code == 3
    assert "did you mean 'sentiment'" in unknown.err


async def test_a_new_definition_is_written_once_and_is_good_as_it_is(tmp_path: Path) -> None:
    file, labelled = tmp_path / "mine.yaml", tmp_path / "topics.yaml"
    written = await graft("tasks", "new", file)
    assert written.code == 0, written.err
    assert "#" in file.read_text()
    again, other, nowhere = await asyncio.gather(
        graft("tasks", "new", file, "--from", "chat"),
        graft("tasks", "new", labelled, "--from", "text-classification", "--label", "yes", "--label", "no"),
        graft("tasks", "new", tmp_path / "absent" / "x.yaml"),
    )
    assert (again.code, other.code, nowhere.code) == (1, 0, 2)
    assert "exists" in again.err
    assert load(file.read_text()) == catalog.builtin("custom")
    assert load(labelled.read_text()).labels == ("yes", "no")


async def test_a_check_shows_the_prompt_of_the_first_row(tmp_path: Path) -> None:
    data = tmp_path / "rows.csv"
    data.write_text(ROWS)
    text, as_json, alone = await asyncio.gather(
        graft("tasks", "check", "sentiment", "--data", data),
        graft("tasks", "check", "sentiment", "--data", data, "--json"),
        graft("tasks", "check", "sentiment"),
    )
    prompt = "Is this review positive or negative?\n\nA joy, all of it."
    assert f"[user]\n{prompt}\n\n[assistant]\npositive\n\n2 rows fit." in text.out
    assert as_json.json["first_row"]["messages"][0] == {"role": "user", "content": prompt}
    assert alone.out.startswith("sentiment, version 1: review → sentiment")


BROKEN = {
    "list": "list.jsonl, line 2: is not a JSON object.",
    "cut": "cut.jsonl, line 1: is not JSON: ",
    "latin": "latin.jsonl, after line 0: is not UTF-8.",
}


async def test_a_check_names_what_is_wrong_with_definition_and_rows(tmp_path: Path) -> None:
    data, bad = tmp_path / "rows.jsonl", tmp_path / "bad.yaml"
    data.write_text("".join(json.dumps({"review": "x" * n, "sentiment": "fine"}) + "\n" for n in range(12)))
    bad.write_text("name: bad\nfields: {review: x}\ncompletion: y\nuser: '{{ film }}'\n")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "list.jsonl").write_text('{"review": "x"}\n[1, 2]\n')
    (tmp_path / "cut.jsonl").write_text('{"review": "x"')
    (tmp_path / "latin.jsonl").write_bytes(b'{"review": "\xe9"}')
    rows, definition, empty, absent, unlabelled, *broken = await asyncio.gather(
        graft("tasks", "check", "sentiment", "--data", data),
        graft("tasks", "check", bad),
        graft("tasks", "check", "sentiment", "--data", tmp_path / "empty.jsonl"),
        graft("tasks", "check", "sentiment", "--data", tmp_path / "absent.jsonl"),
        graft("tasks", "check", "text-classification", "--data", data),
        *(graft("tasks", "check", "sentiment", "--data", tmp_path / f"{name}.jsonl") for name in BROKEN),
    )
    assert {one.code for one in (rows, definition, empty, absent, unlabelled, *broken)} == {2}
    assert [one.err.startswith(told) for one, told in zip(broken, BROKEN.values(), strict=True)] == [True] * 3
    assert rows.err.startswith("12 of 12 rows do not fit the task 'sentiment'.")
    assert "row 1: sentiment: 'fine' is no label of the task: positive, negative; review: is missing" in rows.err
    assert rows.err.count("\n  row") == 10
    assert "user: line 1: uses 'film', which is not declared" in definition.err
    assert "has no rows" in empty.err
    assert "cannot be read: No such file" in absent.err
    assert "text: is missing" in unlabelled.err
