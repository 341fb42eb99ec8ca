"""The page on scale: its formulas on figures made up, and its tables against the committed results."""

from typing import Any

import pytest
from benchmarks import capacity_page
from benchmarks.capacity import ALIAS_SECONDS, MOVED, PASS, TRAINING, Capacity, Figures, Line, late_at, load, walls


def figures(**results: list[tuple[str, str, float]]) -> Figures:
    return Figures(
        {
            name: {"figures": [dict(zip(("figure", "contestant", "median"), one, strict=True)) for one in values]}
            for name, values in results.items()
        }
    )


@pytest.fixture
def made_up() -> Capacity:
    found = figures(
        scale=[
            (f"{PASS} @ 10", "postgresql", 1.0),
            (f"{PASS} @ 1,000", "postgresql", 0.6),
            (f"{PASS} @ 3,000", "postgresql", 1.6),
            ("an adapter of rank 8 on disk", "files", 10e6),
            ("pull a version into an empty cache", "postgresql", 0.5),
        ],
        scale_state=[
            (f"{MOVED} @ 1,000", "postgresql", 0.1),
            (f"{MOVED} @ 100,000", "postgresql", 9.9 + 0.1),
            (f"{TRAINING} @ 10", "loop", 0.1),
            (f"{TRAINING} @ 100", "loop", 1.0),
        ],
    )
    return Capacity(found)


def test_growth_is_a_line_through_the_two_largest_sizes(made_up: Capacity) -> None:
    line = made_up.figures.line(PASS, "postgresql", "scale")
    assert (line.a, line.b) == pytest.approx((0.1, 0.0005))
    assert made_up.pass_seconds(100_000) == pytest.approx(50.1)
    assert line.reaches(50.1) == pytest.approx(100_000)
    assert Line(2.0, 1.0).reaches(1.0) == 0.0


def test_an_alias_is_late_where_a_pass_a_wait_and_a_write_take_the_seconds_promised(made_up: Capacity) -> None:
    # Beyond 1,800 adapters a pass takes longer than the poll: two passes, a quarter of a second and the write.
    assert made_up.alias_seconds(1_000) == pytest.approx(1.0 + 0.25 + 0.6 + 0.1)
    assert made_up.alias_seconds(10_000) == pytest.approx(2 * 5.1 + 0.25 + 1.0)
    assert made_up.alias_seconds(late_at(made_up)) == pytest.approx(ALIAS_SECONDS, abs=0.01)


def test_a_job_is_registered_behind_three_passes(made_up: Capacity) -> None:
    assert made_up.jobs_an_hour(1_000) == pytest.approx(3600 / (3 * 0.6 + 2 * 0.1))


def test_more_adapters_than_an_engine_holds_are_found_by_fewer_requests(made_up: Capacity) -> None:
    assert made_up.found(10) == 1.0
    assert made_up.found(1_600) == pytest.approx(0.01)


def test_replicas_that_pull_from_one_worker_wait_for_each_other(made_up: Capacity) -> None:
    assert made_up.fan_out_bytes(100) == 1e9
    assert made_up.fan_out_seconds(100) == 50.0


def test_a_figure_that_was_not_measured_is_named(made_up: Capacity) -> None:
    with pytest.raises(KeyError, match=r"scale\.json has no 'speed' of files"):
        made_up.figures.get("scale", "speed", "files")


def test_every_table_of_the_page_is_what_the_results_say() -> None:
    text = capacity_page.PAGE.read_text(encoding="utf-8")
    assert text == capacity_page.filled(text, load()), "run `python -m benchmarks.capacity_page`"


def test_a_changed_result_changes_the_page() -> None:
    text, results = capacity_page.PAGE.read_text(encoding="utf-8"), load().results
    doubled: dict[str, Any] = {
        name: {**result, "figures": [{**one, "median": one["median"] * 2} for one in result["figures"]]}
        if "figures" in result
        else result
        for name, result in results.items()
    }
    changed = capacity_page.filled(text, Figures(doubled))
    for name in capacity_page.SECTIONS:
        before, after = (page.partition(f"<!-- scale:{name} -->")[2].partition("\n\n")[0] for page in (text, changed))
        assert before != after, name


def test_a_page_that_lacks_a_section_is_refused() -> None:
    text = capacity_page.PAGE.read_text(encoding="utf-8").replace("<!-- scale:walls -->\n", "")
    with pytest.raises(ValueError, match="should have the sections"):
        capacity_page.filled(text, load())


def test_every_part_with_a_wall_says_what_is_sharded_then() -> None:
    text = capacity_page.PAGE.read_text(encoding="utf-8").partition("## What is sharded then")[2]
    named = {
        part for line in text.splitlines() if line.startswith("| ") for part in line.split("|")[1].strip().split(", ")
    }
    assert {wall.part for wall in walls(Capacity(load()))} <= named
