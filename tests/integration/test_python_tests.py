"""Code graded by its tests in the real sandbox: what passes, what fails, and what tries to pass without being right."""

from typing import Any

import pytest

from graft.domain.errors import InvalidArgument
from graft.domain.grading import GraderSpec
from graft.grading import Grade, GradeItem, build_grader

pytestmark = pytest.mark.integration

TESTS = "assert add(1, 2) == 3\nassert add(-1, 1) == 0\nassert len([add(0, 0)]) == 1\n"


def _grade(completion: str, row: dict[str, Any] | None = None, **settings: Any) -> Grade:
    # Enough where every core is in use: what does not end by itself is given less.
    grader = build_grader(GraderSpec("python_tests", {"timeout_seconds": 60, **settings}))
    (grade,) = grader.grade([GradeItem(row or {"tests": TESTS}, completion)])
    return grade


RIGHT = "def add(a, b):\n    return a + b\n"


@pytest.mark.parametrize(
    "completion",
    [
        RIGHT,
        f"Here it is:\n```python\n{RIGHT}```\nIt adds.",
        f"```\n{RIGHT}",
        f"{RIGHT}\nif __name__ == '__main__':\n    raise SystemExit('not reached')",
        f"from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\n{RIGHT}print('noise')",
        f"sum = len = None\n{RIGHT}",
    ],
)
def test_right_code_passes(completion: str) -> None:
    assert _grade(completion) == Grade(1.0, True, "the tests pass")


@pytest.mark.parametrize(
    ("completion", "detail"),
    [
        ("def add(a, b):\n    return a - b", "AssertionError (tests.py, line 1)"),
        ("I cannot.", "SyntaxError"),
        ("", "NameError: name 'add' is not defined"),
        ("while True: pass", "took longer than 1 s"),
        ("import time; time.sleep(600)", "took longer than 1 s"),
        ("while True: print('x' * 1000)", "wrote more than 65536 bytes"),
        ("def add(a, b):\n    return bytearray(10 * 2**30)", "MemoryError"),
        ("import ctypes; ctypes.string_at(0)", "ended with -11"),
    ],
)
def test_wrong_code_fails_and_says_why(completion: str, detail: str) -> None:
    grade = _grade(completion, **({"timeout_seconds": 1} if "1 s" in detail else {}))
    assert (grade.reward, grade.passed) == (0.0, False)
    assert detail in grade.detail


@pytest.mark.parametrize(
    "completion",
    [
        "print('the tests pass')",
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "def add(a, b):\n    raise SystemExit(0)",
        "import os\ndef add(a, b):\n    os._exit(0)",
        "import os\nfor fd in range(1, 32):\n    try:\n        os.write(fd, b'passed')\n    except OSError: pass",
        "import builtins\nbuiltins.exec = builtins.compile = lambda *a: None",
        "import builtins\nbuiltins.AssertionError = type('E', (Exception,), {})\ndef add(a, b): return 4",
        "import atexit, os\natexit.register(os._exit, 0)",
        "def len(x): return 1\ndef add(a, b): return 3",
        "import os\nos._exit = lambda status: None\ndef add(a, b): return 4",
        "import sys\nsys.settrace(lambda *a: None)\nsys.excepthook = print",
    ],
)
def test_what_only_looks_like_a_pass_fails(completion: str) -> None:
    assert not _grade(completion).passed


def test_a_built_in_that_the_code_shadows_is_not_what_tests_check_with() -> None:
    row = {"tests": "assert all([add(1, 1) == 2, add(1, 2) == 3])"}
    assert not _grade("all = lambda values: True\ndef add(a, b): return 2", row).passed


def test_human_eval_s_form_is_graded() -> None:
    row = {
        "prompt": 'def add(a, b):\n    """Adds."""\n',
        "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
        "entry_point": "add",
    }
    settings = {"field": "test", "prompt_field": "prompt", "entry_point_field": "entry_point"}
    assert _grade("    return a + b\n", row, **settings).passed
    assert _grade(f"```python\n{RIGHT}```", row, **settings).passed
    assert not _grade("    return a - b\n", row, **settings).passed
    assert not _grade("    return 4\n\ndef check(candidate):\n    pass\n", row, **settings).passed
    with pytest.raises(InvalidArgument, match="no name of Python"):
        _grade("", {**row, "entry_point": "add)"}, **settings)


def test_functions_and_cases_that_tests_define_are_run() -> None:
    function = {"tests": "def test_sum():\n    assert add(1, 2) == 3\n"}
    case = {
        "tests": "import unittest\nclass Sums(unittest.TestCase):\n"
        "    def test_sum(self):\n        self.assertEqual(add(1, 2), 3)\n"
    }
    for row in (function, case):
        assert _grade(RIGHT, row).passed
        assert not _grade("def add(a, b): return 4", row).passed


def test_a_completion_without_a_fence_may_be_refused() -> None:
    assert _grade(RIGHT, extract="fence").detail == "there is no fence of Python in the completion"
    assert "SyntaxError" in _grade(f"```python\n{RIGHT}```", extract="whole").detail


def test_a_batch_keeps_its_order() -> None:
    grader = build_grader(GraderSpec("python_tests", {}))
    wrong = "def add(a, b): return 4"
    grades = grader.grade([GradeItem({"tests": TESTS}, code) for code in (RIGHT, wrong, RIGHT, RIGHT, wrong, wrong)])
    assert [grade.reward for grade in grades] == [1, 0, 1, 1, 0, 0]
