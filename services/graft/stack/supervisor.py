"""Starts processes in order, restarts those that die, and leaves none behind.

Owns the life of every process of the local stack, down to grandchildren: the supervisor is a child subreaper
(prctl(2)), so that what outlives its parent comes back to it and is ended too. Does not know what the processes do.
"""

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path

import psutil

from graft.domain.errors import FailedPrecondition
from graft.stack.processes import Process, port_taken

_PR_SET_CHILD_SUBREAPER = 36
_LAUNCH = """
import ctypes, os, sys
if ctypes.CDLL(None).prctl(1, 15, 0, 0, 0) != 0:  # PR_SET_PDEATHSIG, SIGTERM
    sys.exit("prctl failed")
if os.getppid() != int(sys.argv[1]):
    sys.exit("the supervisor has ended")
os.execv(sys.argv[2], sys.argv[2:])
"""
"""Becomes the process, which a supervisor that is killed takes along. Not a `preexec_fn`: that would fork this process
with its gRPC threads, whose fork handlers abort the child now and then."""
FIRST_BACKOFF_SECONDS = 0.5
LONGEST_BACKOFF_SECONDS = 30.0
STEADY_SECONDS = 60.0
"""A process that lived this long starts over with the first back-off."""


class State(StrEnum):
    """Where a process is."""

    WAITING = "waiting"
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    STOPPED = "stopped"


@dataclass
class Status:
    """What is known of one process, for people and for `status`."""

    name: str
    state: State
    log: str
    pid: int | None = None
    restarts: int = 0
    ready_seconds: float | None = None


class Supervisor:
    """Runs `processes` until `stop` is set. `folder` takes the logs and the status file.

    Raises FailedPrecondition from `run` for a taken port, and for a process that does not get ready in time or
    ends five times before it was ever ready; the message names its log.
    """

    def __init__(
        self,
        processes: Sequence[Process],
        folder: Path,
        *,
        on_change: Callable[[Sequence[Status]], None] = lambda _: None,
        stop_seconds: float = 15.0,
        about: Mapping[str, object] | None = None,
    ) -> None:
        """`about` is kept in the status file as it is."""
        self._processes = {process.name: process for process in processes}
        self._folder = folder
        self._on_change = on_change
        self._stop_seconds = stop_seconds
        self._about = dict(about or {})
        self._stop = asyncio.Event()
        self._ready = {name: asyncio.Event() for name in self._processes}
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self.all_ready = asyncio.Event()
        self.statuses = {
            name: Status(name, State.WAITING, str(folder / "logs" / f"{name}.log")) for name in self._processes
        }

    @property
    def status_file(self) -> Path:
        """JSON with the supervisor's pid and every process's status."""
        return self._folder / "run" / "stack.json"

    def stop(self) -> None:
        """Asks `run` to end every process and return."""
        self._stop.set()

    async def run(self) -> None:
        """Starts everything, keeps it running, and ends everything before it returns or raises."""
        for process in self._processes.values():
            for port in process.ports:
                if port_taken(port):
                    raise FailedPrecondition(
                        f"Port {port.number} on {port.host}, which {process.name} needs, is taken. "
                        f"Free it or set {port.setting} to another port.",
                        reason="PORT_TAKEN",
                        metadata={"setting": port.setting},
                    )
        (self._folder / "logs").mkdir(parents=True, exist_ok=True)
        self.status_file.parent.mkdir(parents=True, exist_ok=True)
        if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl failed")
        self._changed()
        tasks = [asyncio.create_task(self._keep(process)) for process in self._processes.values()]
        tasks.append(asyncio.create_task(self._await_all_ready()))
        stopping = asyncio.create_task(self._stop.wait())
        try:
            pending: set[asyncio.Task[object]] = {stopping, *tasks}
            while not self._stop.is_set():
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done - {stopping}:
                    task.result()
        finally:
            for task in (*tasks, stopping):
                task.cancel()
            await asyncio.gather(*tasks, stopping, return_exceptions=True)
            await asyncio.to_thread(self._end_everything)
            for status in self.statuses.values():
                status.state, status.pid = State.STOPPED, None
            self._on_change(list(self.statuses.values()))
            self.status_file.unlink(missing_ok=True)

    async def _await_all_ready(self) -> None:
        for event in self._ready.values():
            await event.wait()
        self.all_ready.set()

    async def _keep(self, process: Process) -> None:
        status = self.statuses[process.name]
        for name in process.after:
            await self._ready[name].wait()
        backoff_seconds = FIRST_BACKOFF_SECONDS
        early_deaths = 0
        while True:
            status.state = State.STARTING
            started = time.monotonic()
            child = self._start(process)
            status.pid = child.pid
            self._changed()
            if await self._become_ready(process, child, started):
                status.state = State.READY
                status.ready_seconds = time.monotonic() - started
                self._ready[process.name].set()
                self._changed()
            code = await self._ended(child)
            # What it started may outlive it, and hold its port.
            await asyncio.to_thread(_end_all, partial(_session, child.pid))
            lived_seconds = time.monotonic() - started
            if not self._ready[process.name].is_set():
                early_deaths += 1
                # Exit code 2 is a wrong configuration by our own convention: trying again cannot help.
                if code == 2 or early_deaths == 5:
                    raise FailedPrecondition(
                        f"{process.name} ended with exit code {code} before it was ready: {self._last_line(process)} "
                        f"See {status.log}.",
                        reason="PROCESS_FAILED",
                        metadata={"process": process.name},
                    )
            if lived_seconds > STEADY_SECONDS:
                backoff_seconds = FIRST_BACKOFF_SECONDS
            status.state, status.pid = State.RESTARTING, None
            status.restarts += 1
            self._changed()
            await asyncio.sleep(backoff_seconds)
            backoff_seconds = min(2 * backoff_seconds, LONGEST_BACKOFF_SECONDS)

    def _start(self, process: Process) -> "subprocess.Popen[bytes]":
        with open(self.statuses[process.name].log, "ab") as log:
            child = subprocess.Popen(
                # Isolated and without `site`: quick, and nothing of the user's is in its way.
                [sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid()), *process.argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **process.environment},
                start_new_session=True,
            )
        self._running[process.name] = child
        return child

    async def _become_ready(self, process: Process, child: "subprocess.Popen[bytes]", started: float) -> bool:
        while child.poll() is None:
            if await asyncio.to_thread(process.probe):
                return True
            if time.monotonic() - started > process.ready_timeout_seconds:
                raise FailedPrecondition(
                    f"{process.name} was not ready after {process.ready_timeout_seconds:.0f} s. "
                    f"See {self.statuses[process.name].log}.",
                    reason="PROCESS_NOT_READY",
                    metadata={"process": process.name},
                )
            await asyncio.sleep(0.2)
        return False

    async def _ended(self, child: "subprocess.Popen[bytes]") -> int:
        # Polled, not awaited in a thread: a thread cannot be cancelled when the stack stops.
        while (code := child.poll()) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.2)
        return code

    def _last_line(self, process: Process) -> str:
        text = Path(self.statuses[process.name].log).read_text(errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        return lines[-1] if lines else "it printed nothing."

    def _end_everything(self) -> None:
        # In reverse order of the list, so that clients end before what they talk to; then whatever is left of the
        # whole tree, which the subreaper flag has kept below us.
        for name in reversed(list(self._running)):
            child = self._running[name]
            tree = [child.pid, *(p.pid for p in _descendants(child.pid))]
            _signal([child.pid], signal.SIGTERM)
            deadline = time.monotonic() + self._stop_seconds
            while child.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            _signal(tree, signal.SIGKILL)
            child.wait()
        mine = {child.pid for child in self._running.values()}
        for _ in range(100):
            left = [p for p in _descendants(os.getpid()) if p.pid not in mine]
            if not left:
                return
            _signal([p.pid for p in left], signal.SIGKILL)
            for orphan in left:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(orphan.pid, os.WNOHANG)
            time.sleep(0.05)

    def _changed(self) -> None:
        statuses = list(self.statuses.values())
        record = {
            "pid": os.getpid(),
            "create_time": psutil.Process().create_time(),
            "ready": all(status.state is State.READY for status in statuses),
            "processes": [asdict(status) for status in statuses],
            **self._about,
        }
        fresh = self.status_file.with_suffix(".tmp")
        fresh.write_text(json.dumps(record, indent=1))
        fresh.replace(self.status_file)
        self._on_change(statuses)


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _session(leader: int) -> list[int]:
    """What is left of a session whose leader has ended: the subreaper flag keeps all of it below us."""
    found = []
    for process in _descendants(os.getpid()):
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(process.pid) == leader:
                found.append(process.pid)
    return found


def _end_all(left: Callable[[], list[int]]) -> None:
    """Kills what `left` finds until it finds nothing: as parents end, their children come to us to be reaped."""
    for _ in range(100):
        pids = left()
        if not pids:
            return
        _signal(pids, signal.SIGKILL)
        for pid in pids:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.05)


def _signal(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
