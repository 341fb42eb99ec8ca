"""Grades code by its row's tests, in the sandbox.

A pass is proven by a random token: the sandbox's runner reads it from a pipe only after the tests have passed, and
writes it to another. Hence these do not pass: printing "passed", `sys.exit(0)` and `os._exit(0)`, writing guesses to
every descriptor, replaced built-ins (restored before the tests), names that shadow built-ins (hidden from the tests), a
`check` of its own (the tests' definition comes later).

What is **not** prevented, since code and tests share one interpreter: code that is written against this very protocol
can read tests and token from the pipe and write the token; objects whose `__eq__` is always true satisfy `==`; modules
of the standard library that the code has changed stay changed for the tests; code that sees its caller's frames can
answer from them. A policy finds such ways only where its samples contain them: read samples whose reward jumps, and
write tests that check types.
"""

import os
import re
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from graft.domain.errors import InvalidArgument
from graft.domain.grading import TESTS_FIELD
from graft.grading.fences import first_fence
from graft.grading.items import Grade, GradeItem, text_of, verdict
from graft.grading.sandbox import Limits, Outcome, check_sandbox, run_python

_RUNNER = Path(__file__).with_name("_runner.py")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


class PythonTests:
    """The completion's code passes the row's tests.

    Raises:
        FailedPrecondition: untrusted code cannot be contained on this machine.
    """

    def __init__(
        self,
        field: str = TESTS_FIELD,
        prompt_field: str | None = None,
        entry_point_field: str | None = None,
        extract: str = "auto",
        timeout_seconds: float = Limits.timeout_seconds,
        memory_bytes: float = Limits.memory_bytes,
    ) -> None:
        check_sandbox()  # a job fails when it starts, not at its first rollout
        self._field = field
        self._prompt_field = prompt_field
        self._entry_point_field = entry_point_field
        self._extract = extract
        self._limits = Limits(timeout_seconds=timeout_seconds, memory_bytes=int(memory_bytes))
        self._runner = _RUNNER.read_text()

    def grade(self, items: Sequence[GradeItem]) -> list[Grade]:
        """1 where the tests pass, else 0; as many at once as this process has cores."""
        with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
            return list(pool.map(self._grade, items))

    def _grade(self, item: GradeItem) -> Grade:
        tests = text_of(item.row, self._field)
        prompt = text_of(item.row, self._prompt_field) if self._prompt_field else ""
        if self._entry_point_field:
            tests += f"\ncheck(completion.{self._entry_point(item)})\n"
        code = item.completion
        if self._extract != "whole":
            fence = first_fence(code, "python", "py")
            if fence is None and self._extract == "fence":
                return verdict(False, "there is no fence of Python in the completion")
            code = code if fence is None else fence
        token = secrets.token_hex(16)
        parts = [(prompt + code).encode("utf-8", "replace"), tests.encode("utf-8", "replace"), token.encode()]
        program = "".join(f"{len(part)}\n{part.decode()}" for part in parts)
        outcome = run_python(self._runner, program, self._limits)
        if outcome.proof == token.encode():
            return verdict(True, "the tests pass")
        return verdict(False, self._why(outcome))

    def _entry_point(self, item: GradeItem) -> str:
        name = text_of(item.row, str(self._entry_point_field))
        if not _NAME.match(name):
            raise InvalidArgument(
                f"The field {self._entry_point_field!r} of a row is {name!r}, which is no name of Python.",
                reason="ROW_FIELD_TYPE",
                metadata={"field": str(self._entry_point_field)},
            )
        return name

    def _why(self, outcome: Outcome) -> str:
        if outcome.ended == "output":
            return f"wrote more than {self._limits.output_bytes} bytes"
        if outcome.ended == "timeout" or outcome.exit_code == -9:
            return f"took longer than {self._limits.timeout_seconds:g} s"
        last = next((line for line in reversed(outcome.output.splitlines()) if line.strip()), "")
        if outcome.exit_code == 1 and last:
            return last
        return f"ended with {outcome.exit_code} before its tests had passed"
