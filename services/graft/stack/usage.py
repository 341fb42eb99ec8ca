"""What the running stack uses: memory and processor time of all its processes, measured from `/proc`.

Owns the counting. Training workers come and go with jobs and are counted apart from what serves.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from graft.domain.errors import FailedPrecondition
from graft.process_memory import pss_bytes
from graft.stack.local import read_status

SAMPLE_SECONDS = 3.0
"""Reading some thirty processes takes a few hundredths of a second of one core."""
_TRAINING_WORKER = "TRAINING_WORKER"
"""In the environment of training workers (`graft.training.fit`); their titles change with what they do."""


@dataclass
class Peak:
    """The highest sums of proportional set sizes (PSS: shared pages divided among those that share them), in bytes."""

    serving_bytes: int = 0
    """All processes but training workers."""
    training_bytes: int = 0
    """Training workers."""

    def sample(self, home: Path) -> None:
        """Takes the present sums into account."""
        serving = training = 0
        for process in stack_processes(home):
            size = pss_bytes(process.pid)
            if _is_training_worker(process):
                training += size
            else:
                serving += size
        self.serving_bytes = max(self.serving_bytes, serving)
        self.training_bytes = max(self.training_bytes, training)


@contextmanager
def peak_memory(home: Path) -> Iterator[Peak]:
    """Samples the stack of `home` in a thread until the block ends."""
    peak = Peak()
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            peak.sample(home)

    thread = threading.Thread(target=work, name="peak-memory", daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def stack_processes(home: Path) -> list[psutil.Process]:
    """Every live process of the stack of `home`, its supervisor first; none when no stack runs."""
    record = read_status(home)
    if record is None:
        return []
    try:
        supervisor = psutil.Process(record["pid"])
        return [supervisor, *supervisor.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


class CpuMeter:
    """Processor time that the stack of `home` has used since this was made, in seconds of one core.

    Counts user and system time of every process, those started since included; the supervised processes must not end
    in between. Raises FailedPrecondition when no stack runs.
    """

    def __init__(self, home: Path) -> None:
        self._home = home
        self._before = self._now()
        if not self._before:
            raise FailedPrecondition("No stack is running. Start one with `graft up`.", reason="STACK_NOT_RUNNING")

    def seconds(self) -> float:
        """Since the meter was made."""
        return sum(seconds - self._before.get(key, 0.0) for key, seconds in self._now().items())

    def _now(self) -> dict[tuple[int, float], float]:
        found = {}
        for process in stack_processes(self._home):
            try:
                times = process.cpu_times()
                found[process.pid, process.create_time()] = times.user + times.system
            except psutil.NoSuchProcess:
                continue
        return found


def _is_training_worker(process: psutil.Process) -> bool:
    try:
        return _TRAINING_WORKER in process.environ()
    except psutil.Error:
        return False
