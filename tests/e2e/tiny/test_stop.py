"""Ctrl-C ends a stack in the foreground, when it runs and while it starts, and nothing of it is left."""

import signal
import subprocess

import pytest

from graft.stack.local import read_status
from tests.support.serving_stack import titles
from tests.support.whole_stack import COMMAND, WholeStack, eventually, make_stack, removed

pytestmark = pytest.mark.e2e


def test_ctrl_c_ends_a_running_stack_and_leaves_no_process(stack: WholeStack) -> None:
    assert len(stack.left()) > 10
    assert stack.interrupt() == 0
    assert titles(stack.left()) == []
    assert stack.graft("status").returncode == 4


def test_ctrl_c_ends_a_stack_that_is_still_starting() -> None:
    with removed(make_stack()) as other:
        starting = subprocess.Popen([*COMMAND, "up"], env=other.environment, stdout=subprocess.DEVNULL)
        eventually(lambda: read_status(other.home), lambda status: status is not None, 60, "the stack is starting")
        eventually(lambda: other.process("ray"), lambda ray: ray["state"] == "ready", 120, "Ray is ready")
        starting.send_signal(signal.SIGINT)
        assert starting.wait(120) == 0
        assert other.left() == []
