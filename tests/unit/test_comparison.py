import io
import math
import re
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from graft.cli.comparing import comparison_table, confusion_table, print_comparison
from graft.domain.errors import InvalidArgument
from graft.evaluation import figures
from graft.evaluation.comparison import Candidate, ComparedTask, Comparison, Result, Speed
from graft.evaluation.comparison_page import render, write
from graft.evaluation.confusion import confusion
from graft.evaluation.figures import Answered, Likelihood, Row
from tests.support.page import HOSTILE, Page

REFERENCES = "pppppnnnnn" * 6
ANSWERS = {
    "large base": "pppnnnnnpp" * 6,
    "small base": "p" * 60,
    "small base, few-shot": "pppppppppn" * 6,
    "tuned@1": "pppppnnnnp" * 6,
    "tuned@2": REFERENCES,
    "large tuned": REFERENCES,
}
SIZES = {"large": 361_000_000, "small": 134_500_000, "tuned@": 135_000_000}
CANDIDATES = tuple(
    Candidate(
        name,
        f"model-of-{name.replace(' ', '-')}",
        tuned="tuned" in name,
        parameters=next(size for start, size in SIZES.items() if name.startswith(start)),
        size_bytes=724_000_000 if name == "large base" else None,
        memory_bytes=1_900_000_000 if name == "large base" else None,
    )
    for name in ANSWERS
)


def _answered(answers: str) -> list[Row]:
    return [Answered(answer, (reference,)) for answer, reference in zip(answers, REFERENCES, strict=True)]


TASK = ComparedTask(
    name="reviews",
    title="Film reviews",
    source="a package",
    license="MIT",
    metrics=("accuracy", "macro_f1"),
    results=tuple(
        Result(name, {Answered: _answered(answers)}, Speed(0.25 * place, 0.5 * place, 41.04))
        for place, (name, answers) in enumerate(ANSWERS.items(), 1)
    ),
    inputs=tuple(f"input {row}" for row in range(60)),
    labels=("p", "n"),
)
COMPARISON = Comparison(
    "Reviews", CANDIDATES, (TASK,), datetime(2026, 11, 25, tzinfo=UTC), {"decoding": "greedy"}, {"processor": "x"}
)


def _only(*names: str, **changes: Any) -> Comparison:
    """The comparison of the named ones."""
    results = tuple(each for each in TASK.results if each.candidate in names)
    candidates = tuple(each for each in CANDIDATES if each.name in names)
    return replace(COMPARISON, candidates=candidates, tasks=(replace(TASK, results=results, **changes),))


def _likely(name: str, nats: float) -> Result:
    return Result(name, {Likelihood: [Likelihood(nats + row % 3, 10, 40) for row in range(60)]})


# -- the answer ----------------------------------------------------------------------------------------------------


def test_the_best_tuned_model_with_a_larger_base_is_compared_with_the_best_of_those() -> None:
    (gain,) = COMPARISON.gains
    # "large tuned" scores as high, but no base is larger; the few-shot base is small, though it may score higher.
    assert (gain.tuned.name, gain.rival.name, gain.smaller) == ("tuned@2", "large base", True)
    assert gain.advantage.value == pytest.approx(0.4)
    assert 0.2 < gain.advantage.low < 0.4 < gain.advantage.high < 0.6
    assert (gain.advantage.metric, gain.advantage.n) == ("accuracy", 60)
    assert COMPARISON.answer == "Yes"
    assert re.fullmatch(
        r"On Film reviews, tuned@2 \(135M\) beats the larger large base \(361M\) by 40\.0 points of accuracy "
        r"\(95% interval \+\d\d\.\d to \+\d\d\.\d\)\.",
        COMPARISON.headline,
    )


def test_without_a_larger_base_the_best_base_is_the_rival_and_that_is_said() -> None:
    found = _only("small base", "small base, few-shot", "tuned@2")
    (gain,) = found.gains
    assert (gain.tuned.name, gain.rival.name, gain.smaller) == ("tuned@2", "small base, few-shot", False)
    assert "larger" not in gain.sentence
    assert found.remarks == ("No base known to be larger was compared.",)


def test_a_base_of_unknown_size_is_not_called_larger() -> None:
    unknown = tuple(replace(each, parameters=None) for each in CANDIDATES)
    assert not replace(COMPARISON, candidates=unknown).gains[0].smaller


def test_a_tuned_model_that_does_worse_is_a_no() -> None:
    results = (
        replace(TASK.results[0], rows={Answered: _answered(REFERENCES)}),
        replace(TASK.results[1], candidate="tuned@1"),
    )
    found = replace(_only("large base", "tuned@1"), tasks=(replace(TASK, results=results),))
    assert (found.answer, found.outcome) == ("No", "worse")
    assert "is beaten by the larger large base (361M) by 50.0 points" in found.headline
    assert "lies below zero: the base does better." in Page(render(found)).text()


def test_rows_that_cannot_tell_are_said_to_be_undecided() -> None:
    nearly = replace(TASK.results[0], candidate="tuned@1", rows={Answered: _answered("pppnnnnnpp" * 5 + "pppnnnnnnn")})
    found = replace(_only("large base", "tuned@1"), tasks=(replace(TASK, results=(TASK.results[0], nearly)),))
    assert (found.answer, found.outcome) == ("Undecided", "undecided")
    assert "these rows cannot tell tuned@1 (135M) from the larger large base (361M) (+3.3 points" in found.headline


def test_where_less_is_better_the_gain_is_still_above_zero() -> None:
    results = (_likely("large base", 30.0), _likely("tuned@1", 20.0), _likely("tuned@2", 25.0))
    found = replace(COMPARISON, tasks=(replace(TASK, metrics=("perplexity",), results=results, labels=(), inputs=()),))
    (gain,) = found.gains
    assert (gain.tuned.name, gain.outcome) == ("tuned@1", "better")
    assert gain.advantage.value == pytest.approx(math.exp(3.1) - math.exp(2.1))
    assert gain.advantage.low > 0
    assert "of perplexity, of which less is better" in found.headline
    assert "Less is better." in render(found)


def test_each_candidate_is_scored_once_for_all_its_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    scored: list[str] = []
    plain = figures.statistic

    def counting(name: str, *rest: Any) -> Any:
        scored.append(name)
        return plain(name, *rest)

    monkeypatch.setattr("graft.evaluation.figures.statistic", counting)
    task = replace(TASK)
    assert task.figures["accuracy"] == TASK.figures["accuracy"]
    for one in ANSWERS:
        for other in ANSWERS:
            there, back = task.difference(one, other), task.difference(other, one)
            assert there is not None
            assert back is not None
            expected = figures.difference("accuracy", _answered(ANSWERS[one]), _answered(ANSWERS[other]))
            for name in ("value", "low", "high"):
                assert getattr(there, name) == pytest.approx(getattr(expected, name), abs=1e-12)
            assert (back.value, back.low, back.high) == (-there.value, -there.high, -there.low)
    measured = 2 * len(ANSWERS)  # accuracy and macro-F1
    by_hand = 2 * len(ANSWERS) ** 2
    assert len(scored) == measured + by_hand


def test_perplexity_is_compared_within_a_tokenizer_and_the_rest_is_said() -> None:
    tokens = {"large base": 8, "small base": 10, "tuned@1": 10}
    results = tuple(
        Result(name, {Likelihood: [Likelihood(nats + row % 3, tokens[name], 40) for row in range(60)]})
        for name, nats in (("large base", 30.0), ("small base", 25.0), ("tuned@1", 20.0))
    )
    scored = replace(TASK, metrics=("perplexity", "bits_per_byte"), results=results, labels=(), inputs=())
    found = replace(COMPARISON, tasks=(scored,))
    assert scored.difference("tuned@1", "large base") is None
    (gain,) = found.gains
    assert (gain.rival.name, gain.smaller, gain.outcome) == ("small base", False, "better")
    assert found.remarks == (
        "No base known to be larger was compared.",
        "On Film reviews, perplexity is not compared between models whose tokenizers differ "
        "(large base | small base, tuned@1): it is a figure a token. Compare bits_per_byte.",
    )
    assert Page(render(found)).text().count("whose tokenizers differ") == 1

    apart = replace(found, tasks=(replace(scored, results=(results[0], results[2])),))
    assert (apart.gains, len(apart.remarks)) == ((), 1)
    by_bytes = replace(found, tasks=(replace(scored, metrics=("bits_per_byte", "perplexity")),))
    (gain,) = by_bytes.gains
    assert (gain.rival.name, gain.smaller, by_bytes.remarks) == ("large base", True, ())


def test_several_tasks_that_differ_are_answered_in_part() -> None:
    same = tuple(replace(each, rows=TASK.results[0].rows) for each in TASK.results)
    found = replace(COMPARISON, tasks=(TASK, replace(TASK, name="other", title="Other", results=same)))
    assert (found.answer, found.headline) == ("In part", "Of 2 tasks it is better on 1, undecided on 1.")
    assert [remark.split(",")[0] for remark in found.remarks] == ["On Film reviews", "On Other"]


def test_nothing_tuned_is_no_answer_and_still_a_page() -> None:
    found = _only("large base", "small base")
    assert (found.gains, found.answer) == ((), "Undecided")
    assert "No task has a fine-tuned model and a base" in found.headline
    page = Page(render(found))
    assert page.open == []


def test_figures_alone_give_the_same_answer_as_the_rows_that_they_were_computed_from() -> None:
    known = tuple(
        Result(
            result.candidate,
            speed=result.speed,
            figures={name: TASK.figures[name][result.candidate] for name in TASK.metrics},
            differences={
                other: found
                for other in ANSWERS
                if other != result.candidate and (found := TASK.difference(result.candidate, other)) is not None
            },
            confusion=TASK.confusions[result.candidate],
        )
        for result in TASK.results
    )
    found = replace(COMPARISON, tasks=(replace(TASK, results=known, inputs=(), labels=()),))
    assert found.tasks[0].figures == TASK.figures
    assert (found.headline, found.remarks) == (COMPARISON.headline, COMPARISON.remarks)
    assert _printed(found) == _printed(COMPARISON)
    assert "Confusion" in Page(render(found)).text()


def test_without_a_paired_difference_there_is_no_answer() -> None:
    known = tuple(
        Result(result.candidate, figures={"accuracy": TASK.figures["accuracy"][result.candidate]})
        for result in TASK.results
    )
    found = replace(COMPARISON, tasks=(replace(TASK, results=known, metrics=("accuracy",), inputs=(), labels=()),))
    assert (found.gains, found.answer) == ((), "Undecided")


def test_a_name_that_says_its_size_is_not_given_another() -> None:
    assert Candidate("360M base", "m", False, 361_000_000).sized_name == "360M base"
    assert Candidate("base", "m", False, 361_000_000).sized_name == "base (361M)"
    assert Candidate("base", "m", False).sized_name == "base"


def test_speed_is_quantiles_of_latency_and_tokens_over_the_whole_time() -> None:
    found = Speed.of([float(second) for second in range(101)], 500, 10.0)
    assert found == Speed(50.0, 95.0, 50.0)
    assert Speed.of([], 0, 0.0) == Speed()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"metrics": ()}, "EMPTY_TASK"),
        ({"results": ()}, "EMPTY_TASK"),
        ({"metrics": ("bleu",)}, "UNKNOWN_METRIC"),
        ({"inputs": ("one",)}, "UNEQUAL_LENGTHS"),
        ({"results": (TASK.results[0], Result("tuned@1", {Answered: _answered(REFERENCES)[:5]}))}, "UNEQUAL_LENGTHS"),
    ],
)
def test_a_task_that_does_not_line_up_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        replace(TASK, **changes)
    assert error.value.reason == reason


@pytest.mark.parametrize(
    "changes",
    [
        {"candidates": CANDIDATES[:2]},
        {"candidates": CANDIDATES + CANDIDATES[:1]},
        {"tasks": ()},
        {"tasks": (TASK, replace(TASK, title="Other"))},
        {"tasks": (replace(TASK, results=TASK.results[:1] * 2),)},
    ],
)
def test_results_of_nobody_and_of_one_twice_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument) as error:
        replace(COMPARISON, **changes)
    assert error.value.reason == "INVALID_COMPARISON"


# -- the page ------------------------------------------------------------------------------------------------------


def test_the_page_is_whole_and_says_what_was_measured() -> None:
    page = Page(render(COMPARISON))
    assert page.open == []
    text = page.text()
    for said in (
        "does the smaller fine-tuned model beat the larger base?",
        "Yes. On Film reviews",
        "25 November 2026, 00:00 UTC",
        "macro-F1",
        "+40.0 points",
        "lies above zero.",
        "latency p50 (seconds)",
        "0.25 s",
        "0.50 s",
        "41.0",
        "1.9 GB",
        "724.0 MB",
        "greedy",
        "Precision",
        "10,000 resamples",
    ):
        assert said in text


def test_every_candidate_has_a_whisker_for_each_metric_and_a_dot_in_the_scatter() -> None:
    page = Page(render(COMPARISON))
    titles = [text for tag, text in page.texts if tag == "title"]
    for name in ANSWERS:
        assert len([title for title in titles if title.startswith(f"{name}: accuracy ")]) == 1
        assert len([title for title in titles if title.startswith(f"{name}: macro-F1 ")]) == 1
    dots = [circle for circle in page.all("circle") if circle["r"] == "9"]
    # Latencies of 0.25 to 1.5 s on an axis from 0 to 1.5 s.
    places = [float((dot["cx"] or "").rstrip("%")) for dot in dots]
    assert places == pytest.approx([100 * place / 6 for place in range(1, 7)], abs=0.01)


def test_what_was_not_measured_is_a_dash_and_no_dot() -> None:
    silent = tuple(replace(each, speed=Speed()) for each in TASK.results[:5])
    page = Page(render(replace(COMPARISON, tasks=(replace(TASK, results=(*silent, TASK.results[5])),))))
    assert not [circle for circle in page.all("circle") if circle["r"] == "9"]
    assert "Quality against latency" not in page.text()
    # Three of speed for five of them, memory and size for all but the large base; and the precision of a label that
    # the small base never answers with.
    assert len([text for tag, text in page.texts if text == "–" and tag == "span"]) == 3 * 5 + 2 * 5 + 1


def test_a_candidate_without_rows_of_a_kind_is_left_out_of_that_metric() -> None:
    both = replace(TASK.results[3], rows={**TASK.results[3].rows, **_likely("tuned@1", 20.0).rows})
    task = replace(TASK, metrics=("accuracy", "perplexity", "win_rate"), results=(TASK.results[0], both))
    assert list(task.figures["perplexity"]) == ["tuned@1"]
    text = Page(render(replace(COMPARISON, tasks=(task,)))).text()
    assert "win rate: not measured." in text


def test_a_confusion_matrix_of_each_is_there_and_those_of_the_answer_are_open() -> None:
    page = Page(render(COMPARISON))
    boxes = [a for a in page.all("details") if a.get("class") == "confusion"]
    assert ["open" in box for box in boxes] == [True, False, False, False, True, False]
    shades = [a["style"] for a in page.all("td") if "style" in a]
    assert shades[:6] == [f"--share: {share}%" for share in (60, 40, 0, 40, 60, 0)]
    assert "Confusion" not in Page(render(replace(COMPARISON, tasks=(replace(TASK, labels=()),)))).text()


def test_links_and_labels_point_at_what_exists_once() -> None:
    page = Page(render(replace(COMPARISON, tasks=(TASK, replace(TASK, name="other", title="Other")))))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    asked = [attributes.get("aria-labelledby") or "" for _, attributes in page.tags]
    wanted = {name for names in asked for name in names.split()}
    wanted |= {(attributes["href"] or "").removeprefix("#") for attributes in page.all("a")}
    assert len(wanted) > 10
    assert wanted <= set(ids)


def test_text_from_strangers_stays_text_wherever_it_stands() -> None:
    hostile = {HOSTILE: HOSTILE}
    first, second = HOSTILE + "1", HOSTILE + "2"
    rows: list[Row] = [Answered(HOSTILE, (HOSTILE,))] * 3
    task = ComparedTask(
        HOSTILE,
        HOSTILE,
        HOSTILE,
        HOSTILE,
        ("accuracy",),
        tuple(Result(name, {Answered: rows}, Speed(1.0)) for name in (first, second)),
        (HOSTILE,) * 3,
        (HOSTILE,),
    )
    found = Comparison(
        HOSTILE,
        (Candidate(first, HOSTILE, True, 10**8), Candidate(second, HOSTILE, False, 10**9)),
        (task, replace(task, name="other")),
        datetime(2026, 1, 1, tzinfo=UTC),
        hostile,
        hostile,
    )
    page = Page(render(found))
    assert page.open == []
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img", "iframe", "object", "form", "base"})
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text().count(HOSTILE) > 40


def test_nothing_is_loaded_from_anywhere() -> None:
    html = render(COMPARISON)
    page = Page(html)
    assert not re.search(r"https?:|//[a-z]|@import|@font-face|url\(", html)
    assert not any("src" in attributes or "srcset" in attributes for _, attributes in page.tags)
    (policy,) = [tag["content"] for tag in page.all("meta") if tag.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline';")
    assert "script-src" not in policy


def test_writing_makes_the_folder_and_leaves_one_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "comparison.html"
    assert write(COMPARISON, path) == path
    assert path.read_text("utf-8") == render(COMPARISON)
    assert [each.name for each in path.parent.iterdir()] == ["comparison.html"]


# -- the terminal --------------------------------------------------------------------------------------------------


def _printed(*things: Any) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    for thing in things:
        if isinstance(thing, Comparison):
            print_comparison(console, thing)
        else:
            console.print(thing)
    return console.export_text()


def test_the_table_has_a_row_for_each_candidate_with_figures_speed_and_size() -> None:
    lines = _printed(comparison_table(COMPARISON, TASK)).splitlines()
    (large,) = [place for place, line in enumerate(lines) if line.lstrip().startswith("large base")]
    assert lines[large].split() == ["large", "base", "60.0%", "0.600", "0.25", "41.0", "1.9", "GB"]
    assert re.fullmatch(r"\s+\d\d\.\d–\d\d\.\d\s+0\.\d{3}–0\.\d{3}\s+0\.50\s+361M\s+724\.0 MB\s*", lines[large + 1])
    assert len([line for line in lines if "tuned" in line]) == 3


def test_a_narrow_terminal_folds_names_and_keeps_all_numbers() -> None:
    console = Console(width=70, file=io.StringIO(), record=True, force_terminal=True)
    print_comparison(console, COMPARISON)
    text = console.export_text()
    assert re.search(r"^ small base, +\S+% ", text, re.MULTILINE)
    assert "361M" in text
    assert "724.0 MB" in text


def test_the_matrix_in_the_terminal_names_other_answers() -> None:
    matrix = confusion(["a", "x", "b", "b"], ["a", "a", "b", "a"], ["a", "b"])
    rows = [line.split() for line in _printed(confusion_table(matrix)).splitlines()]
    assert ["reference", "a", "b", "other", "recall", "precision", "F1"] in rows
    assert ["a", "1", "1", "1", "0.333", "1.000", "0.500"] in rows
    assert ["b", "0", "1", "0", "1.000", "0.500", "0.667"] in rows


def test_all_that_is_printed_takes_names_as_they_are() -> None:
    candidates = (replace(CANDIDATES[0], name="[red]x[/]"), CANDIDATES[4])
    results = (replace(TASK.results[0], candidate="[red]x[/]"), TASK.results[4])
    tasks = (replace(TASK, results=results, title="[bold]"),)
    text = _printed(replace(COMPARISON, candidates=candidates, tasks=tasks))
    assert text.count("[red]x[/]") >= 3
    assert "[bold], 60 rows" in text
    assert "Yes. On [bold], tuned@2 (135M) beats the larger [red]x[/] (361M) by 40.0 points" in text
