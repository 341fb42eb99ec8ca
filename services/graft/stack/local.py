"""Starts, finds and stops the local stack of a home: one at a time, recorded in `run/stack.json`."""

import asyncio
import hashlib
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
READY_SECONDS = 300.0
"""For a stack that another command has started, or one of whose processes is being replaced: as long as one process may
take."""


def read_status(home: Path) -> dict[str, Any] | None:
    """The record of the running stack, or None. A record whose supervisor is gone counts for nothing."""
    file = home / "run" / "stack.json"
    try:
        record: dict[str, Any] = json.loads(file.read_text())
        process = psutil.Process(record["pid"])
    except (FileNotFoundError, psutil.NoSuchProcess):
        return None
    except ValueError:  # cut short when the machine lost its power, and with it the supervisor
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
    about = {"settings": _fingerprints(settings)}
    supervisor = Supervisor(local_stack(settings), settings.home.path, on_change=on_change, about=about)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, supervisor.stop)
    await supervisor.run()


def _fingerprints(settings: Settings) -> dict[str, str]:
    """Of each section, a digest that tells whether it is the same; the section itself may hold a secret."""
    sections = settings.model_dump(mode="json")
    return {
        name: hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
        for name, values in sections.items()
    }


def start_detached(settings: Settings, on_record: Callable[[dict[str, Any]], None] = lambda _: None) -> bool:
    """Starts `graft up` in the background and returns when it is ready. False when it ran already, with these settings.

    `on_record` is told the record of `read_status` some times a second. Whatever it or an interrupt raises on the way
    ends what was started. Raises FailedPrecondition: STACK_FAILED when it ends before it is ready, STACK_RUNNING when
    one runs with other settings, STACK_NOT_READY when one that runs does not become ready within READY_SECONDS.
    """
    _check(settings)
    if (record := read_status(settings.home.path)) is not None:
        _await_running(settings, record, on_record)
        return False
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
                    return True
            time.sleep(0.2)
    except BaseException:
        supervisor.terminate()
        supervisor.wait()
        raise


def _await_running(settings: Settings, record: dict[str, Any], on_record: Callable[[dict[str, Any]], None]) -> None:
    """Returns when the stack of `record` is ready. Raises as `start_detached`."""
    mine, its = _fingerprints(settings), record.get("settings", {})
    if differing := [name for name, digest in its.items() if mine.get(name) != digest]:
        raise FailedPrecondition(
            f"The stack is running already, with other settings of {', '.join(differing)} than it would be started "
            "with now. Stop it with `graft down`, and start it again.",
            reason="STACK_RUNNING",
            metadata={"sections": ", ".join(differing)},
        )
    deadline = time.monotonic() + READY_SECONDS
    found: dict[str, Any] | None = record
    while found is not None:
        on_record(found)
        if found["ready"]:
            return
        if time.monotonic() > deadline:
            late = [
                f"{one['name']} ({one['state']}, {one['log']})" for one in found["processes"] if one["state"] != "ready"
            ]
            raise FailedPrecondition(
                f"The stack is running, but not ready after {READY_SECONDS:.0f} s: {', '.join(late)}. Look there, or "
                "stop it with `graft down`.",
                reason="STACK_NOT_READY",
            )
        time.sleep(0.2)
        found = read_status(settings.home.path)
    raise FailedPrecondition(
        f"The stack that was starting has ended; see {settings.home.path / 'logs'}. Start it again.",
        reason="STACK_FAILED",
    )


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
