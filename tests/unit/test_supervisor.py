import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from graft.domain.errors import FailedPrecondition
from graft.stack.processes import Port, Process
from graft.stack.supervisor import State, Supervisor


def _process(name: str, script: str, ready_file: Path | None = None, **fields: object) -> Process:
    return Process(
        name=name,
        argv=(sys.executable, "-c", script),
        probe=(lambda: True) if ready_file is None else ready_file.exists,
        **fields,  # type: ignore[arg-type]
    )


async def _until(condition: object, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "gave up waiting"
        await asyncio.sleep(0.02)


SLEEP = "import time; time.sleep(1000)"
GRANDCHILD = (
    "import os, time\nwith open(os.environ['GRAFT_TEST_PIDS'], 'a') as f: f.write(f'{os.getpid()} ')\ntime.sleep(1000)"
)


async def test_a_process_starts_only_after_those_it_needs_are_ready(tmp_path: Path) -> None:
    marker = tmp_path / "ready"
    first = _process("first", SLEEP, marker)
    second = _process("second", SLEEP, after=("first",))
    supervisor = Supervisor([first, second], tmp_path)
    running = asyncio.create_task(supervisor.run())
    await _until(lambda: supervisor.statuses["first"].pid)
    await asyncio.sleep(0.3)
    assert supervisor.statuses["second"].state is State.WAITING
    marker.touch()
    await asyncio.wait_for(supervisor.all_ready.wait(), 20)
    supervisor.stop()
    await running
    assert {status.state for status in supervisor.statuses.values()} == {State.STOPPED}


async def test_a_process_that_dies_is_restarted_and_counted(tmp_path: Path) -> None:
    supervisor = Supervisor([_process("only", SLEEP)], tmp_path)
    running = asyncio.create_task(supervisor.run())
    await asyncio.wait_for(supervisor.all_ready.wait(), 20)
    status = supervisor.statuses["only"]
    first = status.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await _until(lambda: status.restarts == 1 and status.state is State.READY)
    assert status.pid != first
    record = json.loads(supervisor.status_file.read_text())
    assert record["pid"] == os.getpid()
    assert record["processes"][0]["restarts"] == 1
    supervisor.stop()
    await running
    assert not supervisor.status_file.exists()


async def test_stopping_leaves_no_grandchild_even_one_that_left_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = tmp_path / "pids"
    # The child starts one grandchild in a session of its own, and another through a parent that ends at once.
    orphan = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {GRANDCHILD!r}], start_new_session=True)"
    script = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {GRANDCHILD!r}], start_new_session=True)\n"
        f"subprocess.run([sys.executable, '-c', {orphan!r}])\n"
        "time.sleep(1000)\n"
    )
    monkeypatch.setenv("GRAFT_TEST_PIDS", str(pids))
    supervisor = Supervisor([_process("parent", script, pids)], tmp_path)
    running = asyncio.create_task(supervisor.run())
    await asyncio.wait_for(supervisor.all_ready.wait(), 20)
    await _until(lambda: len(pids.read_text().split()) == 2)
    grandchildren = [int(pid) for pid in pids.read_text().split()]
    assert all(psutil.pid_exists(pid) for pid in grandchildren)
    supervisor.stop()
    await running
    assert not [pid for pid in grandchildren if psutil.pid_exists(pid)]


async def test_what_a_killed_process_left_behind_is_ended_before_it_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As `mlflow server` does: the process starts a server and waits for it, and the server holds the port.
    pids = tmp_path / "pids"
    monkeypatch.setenv("GRAFT_TEST_PIDS", str(pids))
    script = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {GRANDCHILD!r}])\n"
    supervisor = Supervisor([_process("mlflow", script, pids)], tmp_path)
    running = asyncio.create_task(supervisor.run())
    await asyncio.wait_for(supervisor.all_ready.wait(), 20)
    await _until(lambda: len(pids.read_text().split()) == 1)
    first = int(pids.read_text())
    assert supervisor.statuses["mlflow"].pid is not None
    os.kill(supervisor.statuses["mlflow"].pid, signal.SIGKILL)
    await _until(lambda: len(pids.read_text().split()) == 2)
    assert not psutil.pid_exists(first)
    supervisor.stop()
    await running


async def test_a_taken_port_is_refused_before_anything_starts_naming_the_setting(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = Port("127.0.0.1", taken.getsockname()[1], "GRAFT_GATEWAY_HTTP_PORT")
        supervisor = Supervisor([_process("gateway", SLEEP, ports=(port,))], tmp_path)
        with pytest.raises(FailedPrecondition, match="GRAFT_GATEWAY_HTTP_PORT"):
            await supervisor.run()
    assert supervisor.statuses["gateway"].pid is None


async def test_a_process_with_a_wrong_configuration_fails_the_start_with_its_last_line(tmp_path: Path) -> None:
    script = "import sys; print('Set GRAFT_X.'); sys.exit(2)"
    supervisor = Supervisor([_process("gateway", script, tmp_path / "never")], tmp_path)
    with pytest.raises(FailedPrecondition, match=r"exit code 2 .* Set GRAFT_X\..*gateway\.log"):
        await supervisor.run()


def test_a_killed_supervisor_takes_its_processes_along(tmp_path: Path) -> None:
    script = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from graft.stack.processes import Process\n"
        "from graft.stack.supervisor import Supervisor\n"
        f"child = Process('only', (sys.executable, '-c', {SLEEP!r}), lambda: True)\n"
        f"asyncio.run(Supervisor([child], Path({str(tmp_path)!r})).run())\n"
    )
    supervisor = subprocess.Popen([sys.executable, "-c", script])
    status_file = tmp_path / "run" / "stack.json"
    deadline = time.monotonic() + 20
    while not (status_file.exists() and json.loads(status_file.read_text())["ready"]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    pid = json.loads(status_file.read_text())["processes"][0]["pid"]
    supervisor.kill()
    supervisor.wait()
    child = psutil.Process(pid) if psutil.pid_exists(pid) else None
    if child is not None:
        child.wait(timeout=10)
    assert not psutil.pid_exists(pid)
