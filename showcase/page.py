"""Tells results: `docs/showcase/TASK.json` as they came, and one section a showcase in `docs/showcase.md`.

Owns what is between `<!-- showcase:TASK -->` and `<!-- /showcase:TASK -->`, and the table at the top. What people write
elsewhere, below a section for example, stays. Everything that is told is computed from the JSON files.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.cli.comparing import difference_text
from graft.domain.errors import FailedPrecondition
from graft.evaluation import charts, figures
from showcase.plans import PLANS

Result = Mapping[str, Any]

INTRODUCTION = """\
# Showcases

Real tasks on the packaged base model, each run by one command: it fetches its data, trains within a stated budget of
tokens and compares the result with the untuned model on held-out rows. Intervals are 95% bootstrap intervals over
those rows; differences are paired by row. What did not get better is listed like what did.

<!-- showcase:summary -->
<!-- /showcase:summary -->
"""


@dataclass(frozen=True)
class Verdict:
    """The tuned model against the best of the untuned ones, by the first metric."""

    outcome: str
    """`better`, `worse` or `not shown`."""
    rival: Mapping[str, Any]
    tuned: Mapping[str, Any]
    value: float
    """Tuned less rival, in the metric's own direction; `low` and `high` are the interval's ends."""
    low: float
    high: float

    @property
    def word(self) -> str:
        """For a table."""
        return {"better": "better", "worse": "**worse**", "not shown": "**no difference shown**"}[self.outcome]


def verdict(result: Result) -> Verdict:
    """Raises FailedPrecondition for a result without figures of both sides."""
    metric = figures.metric(result["metrics"][0])
    *_, tuned = result["results"]
    rivals = [one for one in result["results"] if one["model"] == result["large"]]
    if ":" not in tuned["model"] or not rivals:
        raise FailedPrecondition(
            f"The result of {result['showcase']} has no tuned model or no rival.", reason="NO_RIVAL"
        )
    sign = 1 if metric.higher_is_better else -1
    rival = max(rivals, key=lambda one: sign * _figure(one, metric.name)["value"])
    (found,) = (one["figure"] for one in tuned["differences"] if one["baseline"] == rival["label"])
    value, low, high = (float(found[key]) for key in ("value", "low", "high"))
    better, worse = (low > 0, high < 0) if metric.higher_is_better else (high < 0, low > 0)
    return Verdict("better" if better else "worse" if worse else "not shown", rival, tuned, value, low, high)


def write(result: Result, docs: Path) -> Path:
    """Puts the result into the place of the showcase's last one. Returns the page."""
    folder = docs / "showcase"
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / f"{result['showcase']}.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    page = docs / "showcase.md"
    text = page.read_text(encoding="utf-8") if page.is_file() else INTRODUCTION
    text = _put(text, result["showcase"], section(result))
    every = [json.loads((folder / f"{plan.name}.json").read_text()) for plan in PLANS if _is_there(folder, plan.name)]
    _replace(page, _put(text, "summary", summary(every)))
    return page


def summary(results: Sequence[Result]) -> str:
    """A row a showcase, in the order of the plans."""
    lines = [
        "| showcase | how | metric | untuned, best prompt | tuned | difference | |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        metric, found = figures.metric(result["metrics"][0]), verdict(result)
        lines.append(
            f"| [{result['title']}](#{_anchor(result['title'])}) | {result['form']} | {metric.title} "
            f"| {_value(metric, found.rival)} | {_value(metric, found.tuned)} "
            f"| {_difference(metric, found)} | {found.word} |"
        )
    return "\n".join(lines)


def section(result: Result) -> str:
    """All of one showcase."""
    training, data, seconds = result["training"], result["data"], result["seconds"]
    found, named = verdict(result), [figures.metric(name) for name in result["metrics"]]
    task = f"task `{result['task']}`" if result["task"] else f"rows as they are ({result['data']['source']})"
    steps = ", ".join(f"{step} {each / 60:.1f}" for step, each in seconds.items() if each >= 3)
    lines = [
        f"## {result['title']}",
        f"`make showcase-{result['showcase']}`: {result['asks']}",
        "",
        *(["**A smoke run: its figures mean nothing.**", ""] if result["quick"] else []),
        "| | |",
        "|---|---|",
        f"| how | {result['form']}; {task} |",
        f"| base | {result['base']}"
        + (f", against {result['large']}" if result["base"] != result["large"] else "")
        + " |",
        f"| data | {data['train_rows']} rows to train on, {data['heldout_rows']} held out; {data['source']} "
        f"({data['license']}) |",
        f"| trained tokens | {int(training['trained_tokens']):,} of at most {training['token_budget']:,}, in "
        f"{training['steps']} steps |",
        f"| hyperparameters | {_hyperparameters(training['hyperparameters'])} |",
        f"| minutes | {sum(seconds.values()) / 60:.1f} ({steps}) |",
        f"| machine | {_machine(result['machine'])} |",
        "",
        "| answered by | " + " | ".join(f"{metric.title} | 95% interval" for metric in named) + " | p95 s | tokens/s |",
        "|---|" + "---|---|" * len(named) + "---|---|",
    ]
    for one in result["results"]:
        cells = [cell for metric in named for cell in _cells(metric, _figure(one, metric.name))]
        speed = [_number(one.get("latency_p95_seconds"), "{:.2f}"), _number(one.get("tokens_per_second"), "{:.0f}")]
        lines.append(f"| {one['label']} | " + " | ".join([*cells, *speed]) + " |")
    lines += ["", _sentence(named[0], found)]
    if result["caveat"]:
        lines += ["", result["caveat"]]
    return "\n".join(lines)


def _sentence(metric: figures.Metric, found: Verdict) -> str:
    told = _difference(metric, found)
    wanted = "" if metric.higher_is_better else " Lower is better."
    match found.outcome:
        case "better":
            return f"Better than the best untuned answer ({found.rival['label']}): {metric.title} {told}.{wanted}"
        case "worse":
            return f"**It did not help: worse than {found.rival['label']}**, {metric.title} {told}.{wanted}"
    return (
        f"**No improvement is shown** over {found.rival['label']}: {metric.title} {told}, an interval that holds "
        f"zero.{wanted}"
    )


def _difference(metric: figures.Metric, found: Verdict) -> str:
    return difference_text(found.value, found.low, found.high, charts.PERCENT if metric.percent else charts.PLAIN)


def _figure(one: Mapping[str, Any], metric: str) -> dict[str, float]:
    for figure in one.get("figures", ()):
        if figure["metric"] == metric:
            return {key: float(figure[key]) for key in ("value", "low", "high")}
    raise FailedPrecondition(f"{one['label']} has no figure {metric}.", reason="NO_FIGURE")


def _value(metric: figures.Metric, one: Mapping[str, Any]) -> str:
    return _cells(metric, _figure(one, metric.name))[0]


def _cells(metric: figures.Metric, figure: Mapping[str, float]) -> tuple[str, str]:
    if metric.percent:
        return f"{figure['value']:.1%}", f"{figure['low']:.1%} to {figure['high']:.1%}"
    return f"{figure['value']:.3f}", f"{figure['low']:.3f} to {figure['high']:.3f}"


def _number(value: float | None, form: str) -> str:
    return form.format(value) if value else "–"


def _hyperparameters(values: Mapping[str, Any]) -> str:
    told = ("learning_rate", "batch_size", "epochs", "lora.rank", "lora.alpha", "preference.beta")
    return ", ".join(f"{name} {values[name]:g}" for name in told if isinstance(values.get(name), int | float))


def _machine(found: Mapping[str, Any]) -> str:
    return f"{found['cpu']}, {found['cores']} cores, {found['memory_gib']} GiB, accelerators: {found['accelerators']}"


def _anchor(title: str) -> str:
    """As renderers make one of a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def _is_there(folder: Path, name: str) -> bool:
    return (folder / f"{name}.json").is_file()


def _put(text: str, name: str, content: str) -> str:
    """Replaces what is between the markers; without them, adds both at the end."""
    start, end = f"<!-- showcase:{name} -->", f"<!-- /showcase:{name} -->"
    before, opened, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if opened and not closed:
        raise FailedPrecondition(f"docs/showcase.md has `{start}` without `{end}`. Put it back.", reason="PAGE_DAMAGED")
    if not opened:
        before, after = f"{text.rstrip()}\n\n", "\n"
    return f"{before}{start}\n{content}\n{end}{after}"


def _replace(path: Path, text: str) -> None:
    part = path.with_suffix(f"{path.suffix}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
