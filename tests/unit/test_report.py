import math
import re
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from graft.domain.errors import InvalidArgument
from graft.evaluation.pages import fold
from graft.evaluation.report import Contestant, LossPoint, Report, Task, render, write
from tests.support.page import HOSTILE, Page


def _contestant(name: str, answers: str, right: str, model: str = "base") -> Contestant:
    pairs = zip(answers, right, strict=True)
    return Contestant(name, model, tuple(answers), tuple(float(a == r) for a, r in pairs), None)


REFERENCES = "pppppnnnnn" * 4
TASK = Task(
    name="reviews",
    title="Film reviews",
    metric="accuracy",
    source="a package",
    license="MIT",
    inputs=tuple(f"input {row}" for row in range(40)),
    references=tuple(REFERENCES),
    contestants=(
        _contestant("zero-shot", "p" * 40, REFERENCES),
        replace(_contestant("few-shot (8)", "pppppnnppp" * 4, REFERENCES), cpu_seconds_per_thousand=1204.04),
        _contestant("adapter", "pppppnnnnn" * 4, REFERENCES, "base:reviews@1"),
    ),
    curve=tuple(LossPoint(step, 3 / step) for step in range(1, 61)),
    training={"trained tokens": "31,204"},
    lineage={"data set digest": "sha256:9f31"},
)
REPORT = Report(
    "Graft demo", "Better.", True, (TASK,), {"memory": "4.1 GB"}, {"processor": "x"}, datetime(2026, 11, 25, tzinfo=UTC)
)


def _page(**changes: Any) -> Page:
    """The page of the report with one task, changed."""
    return Page(render(replace(REPORT, tasks=(replace(TASK, **changes),))))


def test_the_adapter_is_compared_with_the_best_prompt_of_its_base() -> None:
    assert TASK.best_base().name == "few-shot (8)"
    assert [each.mean for each in TASK.intervals()] == [0.5, 0.7, 1.0]
    found = TASK.advantage()
    assert found.mean == pytest.approx(0.3)
    assert 0.1 < found.low < 0.3 < found.high < 0.5


def test_the_adapter_is_never_its_own_baseline() -> None:
    first, *rest = TASK.contestants
    assert replace(TASK, contestants=(*rest, first)).best_base().name == "adapter"
    assert replace(TASK, contestants=(*rest, first)).advantage().mean == -0.5


def test_a_task_whose_rows_do_not_line_up_is_refused() -> None:
    short = replace(TASK.contestants[0], scores=(1.0,))
    with pytest.raises(InvalidArgument, match=r"40 references, but 1 inputs, 1 scores of 'zero-shot'\.") as error:
        replace(TASK, inputs=("one",), contestants=(short, *TASK.contestants[1:]))
    assert error.value.reason == "UNEQUAL_LENGTHS"


def test_an_adapter_without_a_rival_is_refused() -> None:
    with pytest.raises(InvalidArgument) as error:
        replace(TASK, contestants=TASK.contestants[-1:])
    assert error.value.reason == "TOO_FEW_CONTESTANTS"


def test_the_page_is_whole_and_says_what_was_measured() -> None:
    page = _page()
    assert page.open == []
    text = page.text()
    for said in (
        "Passed. Better.",
        "25 November 2026, 00:00 UTC",
        "Film reviews",
        "Mean accuracy with 95% interval",
        "70.0%",
        "+30.0 points",
        "lies above zero.",
        "loss (nats per completion token)",
        "optimizer step",
        "1,204.0",
        "not measured",
        "31,204",
        "sha256:9f31",
        "4.1 GB",
        "10,000 resamples",
    ):
        assert said in text


@pytest.mark.parametrize(("passed", "word"), [(True, "Passed"), (False, "Failed")])
def test_the_verdict_is_a_word_and_a_mark_before_it_is_a_colour(passed: bool, word: str) -> None:
    html = render(replace(REPORT, passed=passed))
    other = "Failed" if passed else "Passed"
    assert f"<strong>{word}.</strong> Better." in html
    assert f"<title>Graft demo: {word.lower()}</title>" in html
    assert other not in html
    assert html.index("</header>") < html.index("<main>")
    marks = re.findall(r'class="verdict.*?<path d="(.*?)"', html, re.DOTALL)
    assert len(marks) == 1
    assert marks[0].count("M") == (1 if passed else 2)


@pytest.mark.parametrize(
    ("last", "said"),
    [
        ("p" * 40, "below zero: the base model does better"),
        ("pppppnnppp" * 4, "holds zero"),
        (REFERENCES, "above zero"),
    ],
)
def test_the_page_says_what_the_interval_means(last: str, said: str) -> None:
    assert said in _page(contestants=(*TASK.contestants[:2], _contestant("adapter", last, REFERENCES))).text()


def test_text_from_strangers_stays_text_wherever_it_stands() -> None:
    hostile = {HOSTILE: HOSTILE}
    page = Page(
        render(
            Report(
                title=HOSTILE,
                verdict=HOSTILE,
                passed=False,
                tasks=(
                    replace(
                        TASK,
                        name=HOSTILE,
                        title=HOSTILE,
                        source=HOSTILE,
                        license=HOSTILE,
                        inputs=(HOSTILE,) * 40,
                        references=(HOSTILE,) * 40,
                        contestants=tuple(
                            replace(each, name=HOSTILE, model=HOSTILE, answers=(HOSTILE,) * 40)
                            for each in TASK.contestants
                        ),
                        training=hostile,
                        lineage=hostile,
                    ),
                )
                * 2,
                stack=hostile,
                machine=hostile,
                created=datetime(2026, 1, 1, tzinfo=UTC),
            )
        )
    )
    assert page.open == []
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img", "iframe", "object", "form", "base"})
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text().count(HOSTILE) > 40


def test_nothing_is_loaded_from_anywhere() -> None:
    html = render(REPORT)
    page = Page(html)
    links = [attributes["href"] for tag, attributes in page.tags if "href" in attributes and tag != "a"]
    assert links == ["data:,"]
    assert not any("src" in attributes or "srcset" in attributes for _, attributes in page.tags)
    assert not re.search(r"https?:|//[a-z]|@import|@font-face|url\(", html)
    (policy,) = [tag["content"] for tag in page.all("meta") if tag.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline';")
    assert "script-src" not in policy


def test_links_and_labels_point_at_what_exists_once() -> None:
    page = Page(render(replace(REPORT, tasks=(TASK, replace(TASK, title="Other")))))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    asked = [attributes.get("aria-labelledby") or "" for _, attributes in page.tags]
    wanted = {name for names in asked for name in names.split()}
    wanted |= {(attributes["href"] or "").removeprefix("#") for attributes in page.all("a")}
    assert len(wanted) > 10
    assert wanted <= set(ids)


def test_every_picture_has_a_title_or_is_hidden_and_every_table_a_caption() -> None:
    page = _page()
    pictures = [a for a in page.all("svg") if a.get("class") != "curve"]  # the curve lies inside a titled one
    assert all(a.get("aria-hidden") == "true" or (a.get("role") == "img" and a["aria-labelledby"]) for a in pictures)
    assert len(page.all("table")) == len(page.all("caption")) == 1
    assert [text for tag, text in page.texts if tag == "title"][1:4] == [
        "zero-shot: 50.0%, 95% interval 35.0% to 65.0%",
        "few-shot (8): 70.0%, 95% interval 55.0% to 82.5%",
        "adapter: 100.0%, 95% interval 100.0% to 100.0%",
    ]


def test_a_whisker_stands_where_its_numbers_say() -> None:
    page = _page()
    centres = [float((a["cx"] or "").rstrip("%")) for a in page.all("circle")]
    # The axis goes from 20% to 100%; the last circle is the advantage, 0 to 50 points.
    assert centres == pytest.approx([100 * 30 / 80, 100 * 50 / 80, 100, 100 * 30 / 50], abs=0.01)


@pytest.mark.parametrize("losses", [(), (math.nan,), (2.5,), (2.5, 2.5), (2.5, math.nan, math.inf, 1.0), (0.0, 1e30)])
def test_any_curve_gives_a_page_without_nan(losses: tuple[float, ...]) -> None:
    page = _page(curve=tuple(LossPoint(step, loss) for step, loss in enumerate(losses)))
    places = [
        value for tag, a in page.tags for value in a.values() if value and tag in ("path", "line", "circle", "text")
    ]
    assert places
    assert not any(re.search(r"nan|inf", value) for value in places)
    finite = [loss for loss in losses if math.isfinite(loss)]
    text = page.text()
    assert ("No finite training loss" in text) == (not finite)
    assert ("2 left out: not a finite number." in text) == (len(losses) - len(finite) == 2)
    assert ("One recorded step." in text) == (len(finite) == 1)


def test_rows_on_which_scores_differ_are_shown_first_and_in_order() -> None:
    headings = [text for tag, text in _page().texts if tag == "h4"]
    assert headings == [f"Row {row}" for row in (6, 7, 8, 9, 10, 16, 17, 18)]


def test_then_come_rows_whose_answers_differ_then_the_others() -> None:
    same = tuple(replace(each, scores=(1.0,) * 40, answers=("x",) * 40) for each in TASK.contestants)
    other = replace(same[0], answers=("x",) * 20 + ("y", "x", "y") + ("x",) * 17)
    headings = [text for tag, text in _page(contestants=(other, *same[1:])).texts if tag == "h4"]
    assert headings == [f"Row {row}" for row in (21, 23, 1, 2, 3, 4, 5, 6)]


def test_few_rows_are_all_shown() -> None:
    task = replace(
        TASK,
        inputs=("one",),
        references=("a",),
        contestants=tuple(replace(each, answers=("a",), scores=(1.0,)) for each in TASK.contestants),
    )
    text = Page(render(replace(REPORT, tasks=(task,)))).text()
    assert "1 of 1 rows" in text
    assert "Row 1" in text


@pytest.mark.parametrize("long", ["word " * 400, "x" * 2000])
def test_a_long_text_folds_and_loses_nothing(long: str) -> None:
    head, rest = fold(long)
    assert head + rest == long
    assert 240 < len(head) <= 480
    page = _page(inputs=(long,) * 40)
    assert f"{len(rest):,} more characters" in page.text()
    assert "more characters" not in _page(inputs=("x" * 600,) * 40).text()


def test_an_empty_answer_is_said_to_be_empty() -> None:
    adapter = TASK.contestants[-1]
    silent = replace(adapter, answers=(" \n",) * 40, scores=(0.0,) * 40)
    assert _page(contestants=(*TASK.contestants[:-1], silent)).text().count("no text") == 8
    assert "no text" not in _page().text()


def test_scores_between_right_and_wrong_are_numbers() -> None:
    contestants = tuple(replace(each, scores=(0.3124,) * 40) for each in TASK.contestants)
    page = _page(metric="ROUGE-L", contestants=contestants)
    assert "0.312" in page.text()
    assert not {"right", "wrong"} & {text for _, text in page.texts}
    assert "%" not in "".join(text for tag, text in page.texts if tag == "td")


def test_several_tasks_are_summed_up_at_the_top() -> None:
    html = render(replace(REPORT, tasks=(TASK, replace(TASK, title="Other"))))
    header = Page(html[html.index("<header>") : html.index("</header>") + len("</header>")])
    assert [a["href"] for a in header.all("a")] == ["#task-1", "#task-2"]
    assert "70.0%" in header.text()
    assert 'class="summary"' not in render(REPORT)


def test_writing_makes_the_folder_and_leaves_one_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.html"
    assert write(REPORT, path) == path
    assert path.read_text("utf-8") == render(REPORT)
    assert [each.name for each in path.parent.iterdir()] == ["report.html"]


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(self: Path, data: bytes) -> int:
        with open(self, "wb") as file:
            file.write(data[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write(REPORT, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_answer_of_half_a_character_can_be_written(tmp_path: Path) -> None:
    report = replace(REPORT, tasks=(replace(TASK, inputs=("half \ud83d",) * 40),))
    assert "half &#55357;" in write(report, tmp_path / "report.html").read_text("utf-8")
