"""Runs untrusted Python where it can reach nothing and outlive nothing.

Owns the limits and the process; knows nothing of grading. What the code meets:

- **No network**: a network namespace without an interface, and `socket` is refused by seccomp (a network namespace does
  not hold AF_VSOCK, and a path not a Unix socket).
- **No files**: its root is an empty tmpfs that shows the interpreter's own folders, read-only. /tmp is its own, 16 MiB
  in memory, and gone afterwards. There is no /proc. Inherited are neither environment nor file descriptors.
- **No privilege**: it is nobody (in a user namespace; the caller's own user where the caller is not root), without
  capabilities, and cannot gain any.
- **No other processes**: it is alone in a PID namespace, which it cannot leave and whose first process it is: when it
  ends, or is ended, the kernel ends what it started, whatever sessions that made. By default it may start no process
  and no thread, which also keeps memory at the limit of one process.
- **Limits**: address space, CPU time, wall time, open files, bytes of a file and of output.

Needs Linux 5.14 (limits that count per user namespace) on x86-64 or AArch64, with user namespaces allowed. Where one
part is missing nothing runs: there is no weaker mode. It is a process sandbox, not a virtual machine: a fault of the
kernel itself is not contained, and code can still tell the kernel's version and the time.
"""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from graft.domain.errors import FailedPrecondition

_LAUNCHER = Path(__file__).with_name("_launcher.py")
_LAUNCHER_SECONDS = 30.0
"""Beyond the run's own wall time, when a launcher is given up. It ends each run itself; set-up takes 50 ms."""
_SYSTEM_PATHS = (
    "/lib",
    "/lib32",
    "/lib64",
    "/usr/lib",
    "/usr/lib32",
    "/usr/lib64",
    "/usr/local/lib",
    "/etc/ld.so.cache",
)
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")


@dataclass(frozen=True)
class Limits:
    """What a run may use."""

    timeout_seconds: float = 10.0
    """Of CPU, rounded up to whole seconds, and of wall time. HumanEval's solutions take less than 1 s; the rest is for
    machines whose cores are all in use."""
    memory_bytes: int = 512 * 2**20
    """Of address space, of each process."""
    output_bytes: int = 64 * 2**10
    """Of standard output and standard error together; a run that writes more is ended."""
    processes: int = 1
    """Processes and threads at once, itself included."""


@dataclass(frozen=True)
class Outcome:
    """What became of a run. `ended` is `exited`, or the limit that ended it: `timeout` or `output`."""

    ended: str
    exit_code: int
    """Of the process; minus the signal's number when one ended it (−9 also at the limit of CPU time)."""
    output: str
    """What it wrote to standard output and standard error."""
    proof: bytes
    """What it wrote to file descriptor 4."""


def run_python(runner: str, program: str, limits: Limits = Limits()) -> Outcome:
    """Runs the source `runner` in a fresh Python without site-packages; `program` is what it reads from descriptor 3.

    Blocks until the code and everything that it started is gone. Threads may call it at once.

    Raises:
        FailedPrecondition: this machine cannot deny what must be denied, so that nothing was run.
    """
    request = {
        "python": _python(),
        "paths": _paths(),
        "runner": runner,
        "program": program,
        "limits": {
            "timeout_seconds": limits.timeout_seconds,
            "cpu_seconds": math.ceil(limits.timeout_seconds),
            "memory_bytes": int(limits.memory_bytes),
            "output_bytes": limits.output_bytes,
            "processes": limits.processes,
        },
    }
    alive_out, alive_in = os.pipe()  # closes when this process ends, however: the launcher then ends the code
    try:
        with subprocess.Popen(
            [_python(), "-I", "-S", "-B", str(_LAUNCHER), str(alive_out)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={},
            cwd="/",
            pass_fds=(alive_out,),
            start_new_session=True,
        ) as launcher:
            try:
                answer, trouble = launcher.communicate(
                    json.dumps(request).encode(), timeout=limits.timeout_seconds + _LAUNCHER_SECONDS
                )
            except BaseException as error:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(launcher.pid, signal.SIGKILL)
                if isinstance(error, subprocess.TimeoutExpired):
                    raise _unavailable("its launcher did not answer") from None
                raise
    finally:
        os.close(alive_in)
        os.close(alive_out)
    try:
        result = json.loads(answer)
    except ValueError:
        last = trouble.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise _unavailable(f"its launcher ended with {launcher.returncode}: {''.join(last)}") from None
    if "fault" in result:
        raise _unavailable(result["fault"])
    return Outcome(result["ended"], result["exit_code"], result["output"], result["proof"].encode("latin-1"))


def check_sandbox() -> None:
    """Raises FailedPrecondition where untrusted code cannot be contained."""
    outcome = run_python("import os; os.write(4, os.read(3, 2))", "ok")
    if outcome.proof != b"ok":
        raise _unavailable(f"a program that only answers ended with {outcome.exit_code}: {outcome.output}")


def _unavailable(why: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"The sandbox for Python cannot work here, so that no code was run: {why}. It needs Linux 5.14 or later on "
        "x86-64 or AArch64, with unprivileged user namespaces (sysctl user.max_user_namespaces; in a container, a "
        "seccomp and AppArmor profile that allows unshare and mount).",
        reason="SANDBOX_UNAVAILABLE",
    )


@cache
def _python() -> str:
    """The interpreter itself, not the virtual environment's link to it."""
    return os.path.realpath(sys.executable)


@cache
def _paths() -> list[str]:
    """What a Python without site-packages reads: its own folder, the shared libraries, four devices."""
    base = {"installed_base": sys.base_prefix, "platbase": sys.base_exec_prefix}  # not a virtual environment's
    folders = {sysconfig.get_path(name, vars=base) for name in ("stdlib", "platstdlib")}
    own = sorted(folders | {str(sysconfig.get_config_var("LIBDIR"))})
    wanted = [_python(), *own, *_SYSTEM_PATHS, *_DEVICES]
    kept: list[str] = []
    for path in wanted:  # a folder below one that is shown already is there
        if not any(path == shown or path.startswith(f"{shown}/") for shown in kept):
            kept.append(path)
    return kept
