"""Starts, finds and stops the local stack of a home: one at a time, recorded in `run/stack.json`."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from graft.domain.errors import FailedPrecondition
from graft.settings import Settings
from graft.stack import machine, preflight
from graft.stack.processes import local_stack
from graft.stack.supervisor import Status, Supervisor

STOP_SECONDS = 120.0
"""Every process gets 15 s to leave; there are five."""


def read_status(home: Path) -> dict[str, Any] | None:
    """The record of the running stack, or None. A record whose supervisor is gone counts for nothing."""
    file = home / "run" / "stack.json"
    try:
        record: dict[str, Any] = json.loads(file.read_text())
        process = psutil.Process(record["pid"])
    except (FileNotFoundError, psutil.NoSuchProcess):
        return None
    return record if process.create_time() == record["create_time"] else None


def _check(settings: Settings) -> None:
    packages = machine.check_packages()
    if packages.state is machine.State.FAIL:
        raise FailedPrecondition(f"{packages.message} {packages.fix}", reason="PACKAGE_MISSING")
    preflight.check(settings)


def run(settings: Settings, on_change: Callable[[Sequence[Status]], None]) -> None:
    """Runs the stack until SIGTERM or SIGINT. Raises FailedPrecondition when it runs already or cannot start."""
    _check(settings)
    if (record := read_status(settings.home.path)) is not None:
        raise FailedPrecondition(
            f"The stack of {settings.home.path} is running already (pid {record['pid']}). Stop it with `graft down`.",
            reason="STACK_RUNNING",
        )
    asyncio.run(_run(settings, on_change))


async def _run(settings: Settings, on_change: Callable[[Sequence[Status]], None]) -> None:
    supervisor = Supervisor(local_stack(settings), settings.home.path, on_change=on_change)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, supervisor.stop)
    await supervisor.run()


def start_detached(settings: Settings, on_record: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
    """Starts `graft up` in the background and returns when it is ready; raises FailedPrecondition if it ends first.

    `on_record` is told the record of `read_status` some times a second. Whatever it or an interrupt raises on the way
    ends what was started.
    """
    _check(settings)
    if read_status(settings.home.path) is not None:
        raise FailedPrecondition("The stack is running already. Stop it with `graft down`.", reason="STACK_RUNNING")
    logs = settings.home.path / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    log_file = logs / "up.log"
    with open(log_file, "wb") as log:
        supervisor = subprocess.Popen(
            [sys.executable, "-m", "graft.cli.main", "up"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        while True:
            if supervisor.poll() is not None:
                lines = log_file.read_text().strip().splitlines()
                raise FailedPrecondition(
                    lines[-1] if lines else f"The stack ended; see {log_file}.", reason="STACK_FAILED"
                )
            record = read_status(settings.home.path)
            if record is not None:
                on_record(record)
                if record["ready"]:
                    return
            time.sleep(0.2)
    except BaseException:
        supervisor.terminate()
        supervisor.wait()
        raise


def stop(home: Path) -> bool:
    """Stops the running stack and waits for its end. False when none runs. Raises FailedPrecondition if it stays."""
    record = read_status(home)
    if record is None:
        return False
    try:
        supervisor = psutil.Process(record["pid"])
        os.kill(supervisor.pid, signal.SIGTERM)
        supervisor.wait(timeout=STOP_SECONDS)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        raise FailedPrecondition(
            f"The stack (pid {record['pid']}) has not ended after {STOP_SECONDS:.0f} s; see {home / 'logs'}.",
            reason="STACK_STUCK",
        ) from None
    return True
