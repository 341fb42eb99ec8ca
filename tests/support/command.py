"""The `graft` command, run to its end or left running.

ran = await graft("models", "--json", GRAFT_ADDRESS=address)
assert ran.code == 0 and ran.json == []

`graft` runs it in a thread of this process, which spares each of the many runs its imports; `started` as a process of
its own, for those that are interrupted or talked to.
"""

import asyncio
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import structlog
from typer.testing import CliRunner

from graft.cli.main import app

SECONDS = 60.0
"""How long a command may take: far more than any does, for a machine that is busy with other tests."""

PROGRAM = (
    "import signal, sys\n"
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
    "from graft.cli.main import main\n"
    "sys.argv[0] = 'graft'\n"
    "main()\n"
)
"""As the installed script. Ctrl-C and a lost terminal are heeded even where a shell or nohup runs the tests in the
background, with both ignored."""


@dataclass(frozen=True)
class Ran:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as one JSON value."""
        return json.loads(self.out)

    @property
    def json_lines(self) -> list[Any]:
        """Standard output as a JSON value a line."""
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def error(self) -> Any:
        """The error object of standard error."""
        return json.loads(self.err)["error"]


def environment(**variables: object) -> dict[str, str]:
    """This process's, without a GRAFT setting but `variables`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GRAFT_")}
    return kept | {"COLUMNS": "80"} | {name: str(value) for name, value in variables.items()}


async def started(
    *arguments: str | Path, stdin: int = asyncio.subprocess.DEVNULL, **variables: object
) -> asyncio.subprocess.Process:
    """The command, running, its output in pipes."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PROGRAM, *map(str, arguments)),
        stdin=stdin,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment(**variables),
    )


async def ended(process: asyncio.subprocess.Process, stdin: str = "") -> Ran:
    """Waits for the end; what was read before is not in the answer."""
    out, err = await asyncio.wait_for(process.communicate(stdin.encode() or None), SECONDS)
    assert process.returncode is not None
    return Ran(process.returncode, out.decode(), err.decode())


async def graft(*arguments: str | Path, stdin: str = "", **variables: object) -> Ran:
    """Runs the command to its end. What it raises, but for its exit, is raised here."""
    given = [str(argument) for argument in arguments]
    return await asyncio.get_running_loop().run_in_executor(_one_at_a_time, _run, given, stdin, variables)


def _run(arguments: list[str], stdin: str, variables: dict[str, object]) -> Ran:
    inherited: dict[str, str | None] = {name: None for name in os.environ if name.startswith("GRAFT_")}
    given = {name: str(value) for name, value in variables.items()}
    with _quiet_logs():
        result = CliRunner().invoke(app, arguments, input=stdin, env=inherited | given)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Ran(result.exit_code, result.stdout, result.stderr)


_one_at_a_time = ThreadPoolExecutor(1)
"""The runner puts its own files in the place of this process's standard output and error. Its thread is none of the
loop's: as many commands as there are of those would leave the gateway in this process none to answer them by."""


@contextmanager
def _quiet_logs() -> Iterator[None]:
    """A gateway in this process must not log into the command's output."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        yield
    finally:
        structlog.reset_defaults()


async def printed(process: asyncio.subprocess.Process, text: str) -> str:
    """Reads standard output until `text` has come; returns all that was read."""
    assert process.stdout is not None
    read = ""
    async with asyncio.timeout(SECONDS):
        while text not in read:
            piece = await process.stdout.read(4096)
            assert piece, f"ended before {text!r}: {read!r}"
            read += piece.decode()
    return read


async def waiting(process: asyncio.subprocess.Process) -> None:
    """Returns once the command sleeps, as it does in the read that follows its prompt.

    A signal that comes between the two, quicker than any hand, is noticed only when the read returns.
    """
    asleep = 0
    async with asyncio.timeout(SECONDS):
        while asleep < 3:
            await asyncio.sleep(0.05)
            asleep = asleep + 1 if psutil.Process(process.pid).status() == psutil.STATUS_SLEEPING else 0


@contextmanager
def short_home() -> Iterator[Path]:
    """A GRAFT_HOME in which Ray could start: pytest's own folders are too deep for its sockets."""
    home = Path(tempfile.mkdtemp(prefix="graft-", dir="/tmp"))
    try:
        yield home
    finally:
        shutil.rmtree(home)
