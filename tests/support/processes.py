"""Processes that a test starts beside itself, each with its whole group ended afterwards."""

import asyncio
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
