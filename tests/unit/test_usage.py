"""Memory and processor time of a process tree that stands for a stack."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from graft.domain.errors import FailedPrecondition
from graft.stack.usage import CpuMeter, Peak, peak_memory, stack_processes

MEGABYTE = 1_000_000
# Written page by page: a page that was never written is not in memory.
HOLD = "held = bytearray(b'x') * {size}\nopen({ready!r}, 'w').close()\nimport time; time.sleep(1000)"
PARENT = """
import os, subprocess, sys, time, pathlib
children = [
    subprocess.Popen([sys.executable, "-c", source], env={{**os.environ, **variables}})
    for variables, source in {children!r}
]
{body}
time.sleep(1000)
"""
BURN = """
import time
while not pathlib.Path({go!r}).exists(): time.sleep(0.01)
until = time.process_time() + 0.5
while time.process_time() < until: pass
open({done!r}, "w").close()
"""


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "gave up waiting"
        time.sleep(0.02)


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Path]:
    """A home whose stack is a parent that burns half a second when told to, a server and a training worker."""
    sizes: dict[int, dict[str, str]] = {40 * MEGABYTE: {}, 120 * MEGABYTE: {"TRAINING_WORKER": "1"}}
    children = [
        (variables, HOLD.format(size=size, ready=str(tmp_path / f"ready-{size}"))) for size, variables in sizes.items()
    ]
    body = BURN.format(go=str(tmp_path / "go"), done=str(tmp_path / "done"))
    parent = subprocess.Popen([sys.executable, "-c", PARENT.format(children=children, body=body)])
    tree = psutil.Process(parent.pid)
    try:
        _until(lambda: all((tmp_path / f"ready-{size}").exists() for size in sizes))
        (tmp_path / "run").mkdir()
        record = {"pid": parent.pid, "create_time": tree.create_time(), "ready": True, "processes": []}
        (tmp_path / "run" / "stack.json").write_text(json.dumps(record))
        yield tmp_path
    finally:
        for process in [*tree.children(recursive=True), tree]:
            process.kill()
        parent.wait()


def test_training_workers_are_counted_apart(stack: Path) -> None:
    assert len(stack_processes(stack)) == 3
    peak = Peak()
    peak.sample(stack)
    assert 120 * MEGABYTE < peak.training_bytes < 160 * MEGABYTE
    assert 40 * MEGABYTE < peak.serving_bytes < 100 * MEGABYTE


def test_the_peak_outlives_what_reached_it(stack: Path) -> None:
    with peak_memory(stack) as peak:
        _until(lambda: peak.serving_bytes > 0)
        before = peak.serving_bytes
        for process in stack_processes(stack)[1:]:
            process.kill()
    assert peak.serving_bytes >= before


def test_the_meter_counts_what_was_used_since_it_was_made(stack: Path) -> None:
    meter = CpuMeter(stack)
    before = meter.seconds()
    (stack / "go").touch()
    _until((stack / "done").exists)
    assert 0.4 < meter.seconds() - before < 2.0


def test_without_a_stack_there_is_nothing_to_measure(tmp_path: Path) -> None:
    assert stack_processes(tmp_path) == []
    with pytest.raises(FailedPrecondition, match="graft up"):
        CpuMeter(tmp_path)
