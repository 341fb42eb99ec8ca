"""The script of `helm test`, on the local stack."""

import subprocess
import sys

from graft.client import Graft
from tests.support.chart import CHART
from tests.support.tiny_jobs import BASE
from tests.support.whole_stack import WholeStack


def test_the_script_of_helm_test_trains_an_adapter_and_asks_it(stack: WholeStack, graft: Graft) -> None:
    told = subprocess.run(
        [sys.executable, CHART / "files" / "train_and_ask.py", BASE],
        env={**stack.environment, "GRAFT_ADDRESS": stack.settings.gateway_address},
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stdout + told.stderr
    assert f"{BASE}:helm-test@" in told.stdout
    assert [version.model for version in graft.adapter_versions(f"{BASE}:helm-test")]


def test_the_script_says_what_failed(stack: WholeStack) -> None:
    told = subprocess.run(
        [sys.executable, CHART / "files" / "train_and_ask.py", "no-such-base"],
        env={**stack.environment, "GRAFT_ADDRESS": stack.settings.gateway_address},
        capture_output=True,
        text=True,
    )
    assert told.returncode == 1
    assert told.stderr.startswith("failed: ")
    assert "no-such-base" in told.stderr
