"""Tests through the public doors of a whole local stack, started once for a folder of tests.

`tiny` serves a llama with random weights, `backends` the same with PostgreSQL and a bucket, `real` the catalogue's own
base model; one after the other, since two cores carry one stack. Files run in alphabetical order, so in `tiny` those
that kill things (`test_restarts`) and the one that ends the stack (`test_stop`) come last.
"""

from collections.abc import Generator

import pytest

from tests.support.whole_stack import WholeStack


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Shows the ends of the stack's logs below a failed test."""
    report = yield
    stack = getattr(item, "funcargs", {}).get("stack")
    if report.failed and isinstance(stack, WholeStack):
        report.sections.append(("Logs of the stack", stack.last_lines()))
    return report
