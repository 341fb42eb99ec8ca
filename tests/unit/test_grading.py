"""Graders: the settings that are refused, and what each kind pays for which completion."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from graft.domain.errors import FailedPrecondition, InvalidArgument, Unavailable
from graft.domain.grading import EVALUATING_DATASETS, GRADER_KINDS, GraderSpec, check_grader
from graft.grading import Grade, GradeItem, build_grader
from graft.grading.over_http import ATTEMPTS, HttpGrader


def _grade(kind: str, settings: dict[str, Any], row: dict[str, Any], completion: str) -> Grade:
    (grade,) = build_grader(GraderSpec(kind, settings)).grade([GradeItem(row, completion)])
    assert grade.passed == (grade.reward == 1.0)
    return grade


def _passes(kind: str, settings: dict[str, Any], row: dict[str, Any], completion: str) -> bool:
    return _grade(kind, settings, row, completion).passed


@pytest.mark.parametrize(
    ("kind", "settings", "field"),
    [
        ("exact", {}, "grader.kind"),
        ("exact_match", {"fields": "answer"}, "grader.settings.fields"),
        ("exact_match", {"ignore_case": 1}, "grader.settings.ignore_case"),
        ("exact_match", {"field": ""}, "grader.settings.field"),
        ("regex", {}, "grader.settings.pattern"),
        ("regex", {"pattern": "("}, "grader.settings.pattern"),
        ("regex", {"pattern": "a", "timeout_seconds": 0}, "grader.settings.timeout_seconds"),
        ("json_schema", {"schema": []}, "grader.settings.schema"),
        ("numeric", {"absolute_tolerance": -1}, "grader.settings.absolute_tolerance"),
        ("numeric", {"absolute_tolerance": float("nan")}, "grader.settings.absolute_tolerance"),
        ("numeric", {"extract": "("}, "grader.settings.extract"),
        ("reasoning_gym", {"dataset": "countdown"}, "grader.settings.dataset"),
        ("python_tests", {"memory_bytes": 1024}, "grader.settings.memory_bytes"),
        ("python_tests", {"memory_bytes": float("inf")}, "grader.settings.memory_bytes"),
        ("python_tests", {"extract": "none"}, "grader.settings.extract"),
        ("http", {"url": "file:///etc/passwd"}, "grader.settings.url"),
        ("http", {"url": "http://host:port/"}, "grader.settings.url"),
        ("http", {"url": "http://user:word@host/"}, "grader.settings.url"),
    ],
)
def test_a_wrong_setting_is_named(kind: str, settings: dict[str, Any], field: str) -> None:
    assert [violation.field for violation in check_grader(GraderSpec(kind, settings))] == [field]


def test_all_faults_of_a_grader_are_reported_together_and_none_is_built() -> None:
    spec = GraderSpec("regex", {"pattern": "(", "flags": "i", "field": 3})
    fields = ["method.grader.settings.flags", "method.grader.settings.pattern", "method.grader.settings.field"]
    assert [violation.field for violation in check_grader(spec, "method.grader")] == fields
    with pytest.raises(InvalidArgument) as caught:
        build_grader(spec)
    assert len(caught.value.violations) == 3


@pytest.mark.parametrize("kind", [kind for kind in GRADER_KINDS if kind not in ("python_tests", "reasoning_gym")])
def test_a_grader_of_each_kind_is_built_of_what_passes_the_check(kind: str) -> None:
    needed: dict[str, dict[str, Any]] = {
        "regex": {"pattern": "a"},
        "json_schema": {"schema": {}},
        "http": {"url": "http://127.0.0.1:1/grade"},
    }
    spec = GraderSpec(kind, needed.get(kind, {}))
    assert list(check_grader(spec)) == []
    assert build_grader(spec).grade([]) == []


@pytest.mark.parametrize(
    ("settings", "completion", "passes"),
    [
        ({}, " Paris\n", True),
        ({}, "paris", False),
        ({"ignore_case": True}, "PARIS", True),
        ({"strip": False}, "Paris ", False),
        ({}, "Paris, of course", False),
    ],
)
def test_an_exact_match_is_the_whole_completion(settings: dict[str, Any], completion: str, passes: bool) -> None:
    assert _passes("exact_match", settings, {"answer": "Paris"}, completion) is passes


def test_a_row_without_the_reference_is_an_error_rather_than_a_reward() -> None:
    for kind in ("exact_match", "numeric"):
        with pytest.raises(InvalidArgument, match="needs the field 'answer'") as caught:
            _grade(kind, {}, {"label": "x"}, "x")
        assert caught.value.reason == "ROW_FIELD_MISSING"


def test_a_pattern_may_have_to_capture_the_reference() -> None:
    settings = {"pattern": r"####\s*(\S+)", "field": "answer"}
    assert _passes("regex", settings, {"answer": 42}, "so\n#### 42")
    assert not _passes("regex", settings, {"answer": 42}, "so\n#### 41")
    assert not _passes("regex", settings, {"answer": 42}, "42")
    assert _passes("regex", {"pattern": "[0-9]{3}"}, {}, "call 911")


def test_a_search_that_backtracks_without_end_fails_the_completion() -> None:
    settings = {"pattern": "(a|aa)+$", "timeout_seconds": 0.05}
    assert _grade("regex", settings, {}, "a" * 5000 + "b") == Grade(0.0, False, "the search took too long")


@pytest.mark.parametrize(
    ("completion", "passes"),
    [
        ("The answer is 1,234.5.", True),
        ("first 7, then 1234.50", True),
        ("1.2345e3", True),
        ("1234.5 kg", True),
        ("1234.5 or 6", False),
        ("-1234.5", False),
        ("none", False),
        ("", False),
        ("1e999", False),
        ("nan", False),
        ("v1234.5", False),
    ],
)
def test_the_last_number_of_a_completion_counts(completion: str, passes: bool) -> None:
    assert _passes("numeric", {}, {"answer": "1,234.5"}, completion) is passes


def test_signs_and_tolerances_are_understood() -> None:
    assert _passes("numeric", {}, {"answer": -3}, "x = \N{MINUS SIGN}3")
    assert _passes("numeric", {}, {"answer": 3}, "5-3")
    assert _passes("numeric", {"absolute_tolerance": 0.5}, {"answer": 3}, "3.5")
    assert not _passes("numeric", {"absolute_tolerance": 0.5}, {"answer": 3}, "3.51")
    assert _passes("numeric", {"relative_tolerance": 0.1}, {"answer": 100}, "91")
    assert _passes("numeric", {"extract": r"boxed\{(.*?)\}"}, {"answer": 2}, r"\boxed{2} in 10 steps")
    with pytest.raises(InvalidArgument, match="is no number"):
        _grade("numeric", {}, {"answer": "two"}, "2")


SCHEMA = {"type": "object", "required": ["age"], "properties": {"age": {"type": "integer"}, "id": {"pattern": "^a+$"}}}


@pytest.mark.parametrize(
    ("completion", "detail"),
    [
        ('{"age": 3}', "satisfies the schema"),
        ('Here:\n```json\n{"age": 3}\n```\nDone.', "satisfies the schema"),
        ('```\n{"age": 3}', "satisfies the schema"),
        ('{"age": "3"}', "$.age: '3' is not of type 'integer'"),
        ('{"age": 3, "id": "b"}', "$.id: 'b' does not match '^a+$'"),
        ("age 3", "not JSON"),
        ('{"age": NaN}', "NaN is not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"age": 3} and more', "not JSON"),
    ],
)
def test_json_must_satisfy_the_schema(completion: str, detail: str) -> None:
    grade = _grade("json_schema", {"schema": SCHEMA}, {}, completion)
    assert detail in grade.detail
    assert grade.passed is (detail == "satisfies the schema")


def test_a_wrong_schema_and_one_that_refers_elsewhere_are_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"wrong at \$\.type"):
        build_grader(GraderSpec("json_schema", {"schema": {"type": "thing"}}))
    with pytest.raises(InvalidArgument, match="not in it"):
        _grade("json_schema", {"schema": {"$ref": "http://127.0.0.1:1/schema.json"}}, {}, "{}")


def test_a_pattern_of_a_schema_that_backtracks_without_end_fails_the_completion() -> None:
    grade = _grade("json_schema", {"schema": {"pattern": "(a|aa)+$"}}, {}, json.dumps("a" * 5000 + "b"))
    assert grade.detail == "a pattern of the schema took too long"


@contextmanager
def _server(answer: Callable[[int, Any], tuple[int, bytes]]) -> Iterator[tuple[str, list[Any]]]:
    """A grader that answers the n-th request with `answer(n, body)`; yields its URL and the bodies that it got."""
    bodies: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            status, content = answer(len(bodies), bodies[-1])
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/grade", bodies
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


ITEMS = [GradeItem({"answer": "a"}, "b"), GradeItem({"answer": "c"}, "c")]


def test_a_grader_over_http_gets_a_batch_and_gives_a_reward_an_item() -> None:
    with _server(lambda _, body: (200, json.dumps({"rewards": [0.25] * (len(body["items"]) - 1) + [2]}).encode())) as (
        url,
        bodies,
    ):
        grades = build_grader(GraderSpec("http", {"url": url})).grade(ITEMS)
    assert [(grade.reward, grade.passed) for grade in grades] == [(0.25, False), (2.0, True)]
    assert bodies == [
        {"items": [{"row": {"answer": "a"}, "completion": "b"}, {"row": {"answer": "c"}, "completion": "c"}]}
    ]


def test_a_grader_that_restarts_is_asked_again() -> None:
    waits: list[float] = []
    with _server(lambda n, _: (503, b"starting") if n < 3 else (200, b'{"rewards": [1, 0]}')) as (url, bodies):
        grades = HttpGrader(url, sleep=waits.append).grade(ITEMS)
    assert [grade.reward for grade in grades] == [1.0, 0.0]
    assert len(bodies) == 3
    assert waits == [0.5, 1.0]


def test_a_grader_that_is_away_is_unavailable() -> None:
    with _server(lambda *_: (200, b"")) as (url, _):
        pass
    waits: list[float] = []
    with pytest.raises(Unavailable, match="did not answer 5 times; at last ConnectError") as caught:
        HttpGrader(url, sleep=waits.append).grade(ITEMS)
    assert caught.value.reason == "GRADER_UNAVAILABLE"
    assert len(waits) == ATTEMPTS - 1


@pytest.mark.parametrize(
    ("status", "answer", "reason", "message"),
    [
        (404, b"no such page", "GRADER_REFUSED", "answered 404: no such page"),
        (302, b"", "GRADER_REFUSED", "answered 302"),
        (200, b"<html>", "GRADER_ANSWER_INVALID", "is not JSON of the form"),
        (200, b"[1, 0]", "GRADER_ANSWER_INVALID", "is not JSON of the form"),
        (200, b'{"rewards": [1]}', "GRADER_ANSWER_INVALID", "a list of 2 rewards"),
        (200, b'{"rewards": [1, NaN]}', "GRADER_ANSWER_INVALID", "the one of item 1"),
        (200, b'{"rewards": [true, 1]}', "GRADER_ANSWER_INVALID", "the one of item 0"),
    ],
)
def test_a_grader_that_answers_nonsense_is_at_fault(status: int, answer: bytes, reason: str, message: str) -> None:
    with (
        _server(lambda *_: (status, answer)) as (url, bodies),
        pytest.raises(FailedPrecondition, match=re.escape(message)) as caught,
    ):
        HttpGrader(url).grade(ITEMS)
    assert caught.value.reason == reason
    assert len(bodies) == 1


def _entry(**changes: Any) -> dict[str, Any]:
    return {"question": "4 - 1 - 7 =", "answer": "-4", "metadata": {"num_terms": 3}} | changes


@pytest.mark.parametrize(
    ("row", "completion", "reward"),
    [
        (_entry(), "-4", 1.0),
        (_entry(metadata='{"num_terms": 3}'), "I subtract.\n<answer> -4 </answer>", 1.0),
        (_entry(), "<answer>9</answer> no, <answer>-4", 1.0),
        (_entry(), "5", 0.0),
        (_entry(), "", 0.0),
    ],
)
def test_a_task_scores_its_own_entries(row: dict[str, Any], completion: str, reward: float) -> None:
    assert _grade("reasoning_gym", {"dataset": "chain_sum"}, row, completion).reward == reward


def test_an_unknown_task_or_option_is_refused_and_so_are_scorers_that_evaluate_answers() -> None:
    for settings in ({"dataset": "chain_sums"}, {"dataset": "chain_sum", "config": {"terms": 3}}):
        with pytest.raises(InvalidArgument, match="reasoning-gym makes no data set"):
            build_grader(GraderSpec("reasoning_gym", settings))
    import reasoning_gym.factory

    assert reasoning_gym.factory.DATASETS.keys() >= EVALUATING_DATASETS
    with pytest.raises(InvalidArgument, match="evaluates answers as code"):
        build_grader(GraderSpec("reasoning_gym", {"dataset": "puzzle24"}))
