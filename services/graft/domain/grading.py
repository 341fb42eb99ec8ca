"""A grader as asked for: its kind and settings, and what is wrong with them.

Does not grade (`graft.grading`) and looks nothing up: what needs a library or a network is checked when the grader is
built.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

from graft.domain.errors import FieldViolation

REFERENCE_FIELD, TESTS_FIELD = "answer", "tests"
"""Of a row, where a grader is told no other field."""
_FIELDS = {
    "exact_match": {"field": REFERENCE_FIELD},
    "numeric": {"field": REFERENCE_FIELD},
    "regex": {"field": ""},
    "python_tests": {"field": TESTS_FIELD, "prompt_field": "", "entry_point_field": ""},
}
"""Settings that name a field of each row, with their defaults."""

Check = Callable[[Any], str | None]
"""Says what is wrong with a setting's value, or None."""

MAX_TIMEOUT_SECONDS = 600.0
"""The upper end catches slips of the keyboard: a rollout of 64 completions would wait hours at it."""
MIN_SANDBOX_BYTES = 64 * 2**20
"""A bare Python 3.11 maps about 20 MB; below this a fault would be the interpreter's rather than the code's."""
MAX_SANDBOX_BYTES = 64 * 2**30

EVALUATING_DATASETS = frozenset(
    {
        "binary_matrix",
        "bitwise_arithmetic",
        "countdown",
        "intermediate_integration",
        "n_queens",
        "number_sorting",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
        "spiral_matrix",
        "string_insertion",
    }
)
"""Data sets of reasoning-gym 0.1.25 whose scorer gives the answer or the row to `eval`, directly or through
`sympy.parse_expr`: a completion would run as code in the worker."""


@dataclass(frozen=True)
class GraderSpec:
    """Which grader, with which settings. A setting with a default may be left out; an unknown one is refused.

    A `field` names a field of the prompt's row; of rows of a task's fields the reference is the task's completion
    where none is named. Kinds:

    - `exact_match`: the completion is the reference. `field` ("answer"), `ignore_case` (false), `strip` (true: white
      space around both is ignored).
    - `regex`: `pattern` (required, Python's syntax) is found in the completion; with `field`, what it captured (group
      1, or the whole match when it has no group) must also equal that field, white space around both aside.
      `timeout_seconds` (1): a search that takes longer fails the completion.
    - `json_schema`: the completion's JSON, in its first fence of three backticks or else the whole of it, satisfies
      `schema` (required, an object). References to other documents are not fetched.
    - `numeric`: a number in the completion is near the reference: |x − reference| ≤ max(absolute, relative × the larger
      of both), as `math.isclose`. `field` ("answer"), `absolute_tolerance` (0), `relative_tolerance` (1e-9: decimal
      fractions written in two ways), `extract` ("last_number", or a pattern whose group 1, or whole match without
      one, is the number).
    - `reasoning_gym`: scored by the task that made the row, in [0, 1]; passed at 1. `dataset` (required, such as
      "chain_sum"), `config` (the data set's own options, {}). The row is its entry: `question`, `answer`, `metadata`
      (an object, or its JSON). The answer is what stands in the last <answer></answer>, or else the whole completion.
      Data sets whose scorers evaluate answers as code are refused (`EVALUATING_DATASETS`).
    - `python_tests`: the completion's code, then the row's tests, run in a sandbox without a network. `field` ("tests":
      source that raises when the code is wrong), `prompt_field` (none: a field put in front of the code, as HumanEval
      needs), `entry_point_field` (none: a field with a name, for tests that define `check(candidate)`), `extract`
      ("auto": the first fence, or else everything; "fence": a completion without one fails; "whole"),
      `timeout_seconds` (10: of CPU and of wall time, a completion), `memory_bytes` (512 MiB).
    - `http`: POST {"items": [{"row": …, "completion": …}]} to `url` (required, http or https), which answers
      {"rewards": [number, …]}, one an item. `timeout_seconds` (60), `passing_reward` (1: a completion with this reward
      or more has passed). No credentials are sent and redirects are not followed.
    """

    kind: str
    settings: dict[str, Any] = field(default_factory=dict)


def row_fields(spec: GraderSpec) -> dict[str, str]:
    """The fields that every row must have, by the setting that names each."""
    named = {setting: spec.settings.get(setting, usual) for setting, usual in _FIELDS.get(spec.kind, {}).items()}
    return {setting: name for setting, name in named.items() if name}


def compared_with(spec: GraderSpec, field: str) -> GraderSpec:
    """The same grader; where it compares with a reference and is told no field, with this one."""
    if _FIELDS.get(spec.kind, {}).get("field") != REFERENCE_FIELD or "field" in spec.settings:
        return spec
    return replace(spec, settings={**spec.settings, "field": field})


def check_grader(spec: GraderSpec, path: str = "grader") -> Iterator[FieldViolation]:
    """Everything wrong with a grader, with fields below `path`."""
    checks = _SETTINGS.get(spec.kind)
    if checks is None:
        yield FieldViolation(f"{path}.kind", f"{spec.kind!r} is none of {', '.join(_SETTINGS)}")
        return
    for name in sorted(spec.settings.keys() - checks.keys()):
        yield FieldViolation(f"{path}.settings.{name}", f"a grader of kind {spec.kind} has {', '.join(checks)}")
    for name, check in checks.items():
        if name in spec.settings:
            fault = check(spec.settings[name])
            if fault:
                yield FieldViolation(f"{path}.settings.{name}", fault)
        elif (spec.kind, name) in _REQUIRED:
            yield FieldViolation(f"{path}.settings.{name}", f"is required by a grader of kind {spec.kind}")


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) and value else "must be a string that is not empty"


def _flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "must be true or false"


def _object(value: Any) -> str | None:
    return None if isinstance(value, dict) else "must be an object"


def _pattern(value: Any) -> str | None:
    fault = _text(value)
    if fault:
        return fault
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        return f"is not a regular expression of Python: {error}"
    return None


def _number(least: float, most: float) -> Check:
    def check(value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return "must be a finite number"
        return None if least <= value <= most else f"must be from {least:g} to {most:g}"

    return check


def _whole_number(least: int, most: int) -> Check:
    def check(value: Any) -> str | None:
        # JSON and protobuf's Struct know no integers: 536870912.0 is one.
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
            return "must be a whole number"
        return None if least <= value <= most else f"must be from {least} to {most}"

    return check


def _one_of(*names: str) -> Check:
    def check(value: Any) -> str | None:
        return None if value in names else f"must be one of {', '.join(names)}"

    return check


def _number_pattern(value: Any) -> str | None:
    return None if value == "last_number" else _pattern(value)


def _safe_dataset(value: Any) -> str | None:
    if isinstance(value, str) and value in EVALUATING_DATASETS:
        return f"the scorer of {value} evaluates answers as code; use another data set, or python_tests"
    return _text(value)


def _url(value: Any) -> str | None:
    fault = _text(value)
    if fault:
        return fault
    try:
        parts = urlsplit(value)
        parts.port  # noqa: B018 - the property raises for a port that is none
    except ValueError as error:
        return f"is not a URL: {error}"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return "must be an http or https URL with a host"
    if parts.username or parts.password:
        return "must not carry credentials: they would be stored with the job"
    return None


_SETTINGS: dict[str, dict[str, Check]] = {
    "exact_match": {"field": _text, "ignore_case": _flag, "strip": _flag},
    "regex": {"pattern": _pattern, "field": _text, "timeout_seconds": _number(0.001, MAX_TIMEOUT_SECONDS)},
    "json_schema": {"schema": _object},
    "numeric": {
        "field": _text,
        "absolute_tolerance": _number(0, math.inf),
        "relative_tolerance": _number(0, 1),
        "extract": _number_pattern,
    },
    "reasoning_gym": {"dataset": _safe_dataset, "config": _object},
    "python_tests": {
        "field": _text,
        "prompt_field": _text,
        "entry_point_field": _text,
        "extract": _one_of("auto", "fence", "whole"),
        "timeout_seconds": _number(0.1, MAX_TIMEOUT_SECONDS),
        "memory_bytes": _whole_number(MIN_SANDBOX_BYTES, MAX_SANDBOX_BYTES),
    },
    "http": {
        "url": _url,
        "timeout_seconds": _number(0.1, MAX_TIMEOUT_SECONDS),
        "passing_reward": _number(-math.inf, math.inf),
    },
}
_REQUIRED = frozenset(
    {("regex", "pattern"), ("json_schema", "schema"), ("reasoning_gym", "dataset"), ("http", "url")},
)
GRADER_KINDS = tuple(_SETTINGS)
