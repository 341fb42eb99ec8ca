"""Processes that a test starts beside itself, holds where they are, and ends."""

import asyncio
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

STOP_SECONDS = 10.0
"""A process stops when the kernel next runs it, or returns to it from a call that is not interrupted."""


@contextmanager
def process(arguments: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own, whose whole group is ended afterwards."""
    with open(log, "ab") as output:
        running = subprocess.Popen(arguments, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        yield running
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(running.pid, number)
            except ProcessLookupError:
                break
            deadline = time.monotonic() + 10
            while running.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)


async def listening(port: int, log: Path, seconds: float) -> None:
    """Waits until something listens on a port of loopback; fails with the end of the log."""
    deadline = time.monotonic() + seconds
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        await asyncio.sleep(0.2)


@contextmanager
def held(processes: Sequence[psutil.Process]) -> Iterator[None]:
    """In the block they do nothing: what they are in the middle of is not over before a test has looked."""
    _each(processes, "suspend")
    deadline = time.monotonic() + STOP_SECONDS
    try:
        for one in processes:
            while not _stands(one):
                assert time.monotonic() < deadline, f"{one} does not stop"
                time.sleep(0.001)
        yield
    finally:
        _each(processes, "resume")


@contextmanager
def slowed(processes: Sequence[psutil.Process], running_seconds: float, held_seconds: float) -> Iterator[None]:
    """In the block they work for so long and then do nothing for so long, in turn."""
    over = threading.Event()

    def turns() -> None:
        while not over.wait(running_seconds):
            with held(processes):
                over.wait(held_seconds)

    thread = threading.Thread(target=turns)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def end(processes: Sequence[psutil.Process]) -> None:
    """Kills them, and waits until they are gone: what comes next may want their ports."""
    _each(processes, "kill")
    psutil.wait_procs(processes, timeout=10)


def _stands(process: psutil.Process) -> bool:
    try:
        return process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _each(processes: Sequence[psutil.Process], action: str) -> None:
    for one in processes:
        with suppress(psutil.NoSuchProcess):  # the kernel ends some with their parent
            getattr(one, action)()
