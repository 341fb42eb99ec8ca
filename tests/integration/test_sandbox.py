"""Untrusted code, for real: what it tries to reach, to use up and to leave behind."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from graft.grading.sandbox import Limits, Outcome, run_python

pytestmark = pytest.mark.integration

MARK = f"# untrusted code of test_sandbox in {os.getpid()}"
SHORT = Limits(timeout_seconds=1)
"""For code that does not end by itself."""
ENOUGH = Limits(timeout_seconds=60)
"""For code that does, on a machine whose cores are all in use."""


def _run(code: str, limits: Limits = ENOUGH) -> Outcome:
    return run_python(f"{MARK}\n{textwrap.dedent(code)}", "", limits)


def _left() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        if any(MARK in part for part in process.info["cmdline"] or ()) and process.info["status"] != "zombie":
            found.append(process)
    return found


@pytest.fixture(autouse=True)
def _no_process_stays() -> Iterator[None]:
    yield
    assert _left() == []


def _fails_with(code: str, error: str) -> None:
    outcome = _run(code)
    assert outcome.ended == "exited"
    assert outcome.exit_code == 1
    assert error in outcome.output


def test_code_runs_and_answers() -> None:
    outcome = run_python("import os; print('hello'); os.write(4, os.read(3, 100)[::-1])", "abc", ENOUGH)
    assert (outcome.ended, outcome.exit_code, outcome.output, outcome.proof) == ("exited", 0, "hello\n", b"cba")


def test_an_infinite_loop_ends() -> None:
    assert _run("while True: pass", SHORT).exit_code == -signal.SIGKILL


def test_a_sleeper_ends() -> None:
    assert _run("import time; time.sleep(600)", SHORT).ended == "timeout"


def test_ten_gigabytes_cannot_be_allocated() -> None:
    _fails_with("bytearray(10 * 2**30)", "MemoryError")


def test_memory_that_the_address_space_does_not_count_cannot_be_had() -> None:
    _fails_with("import os; os.memfd_create('x')", "PermissionError")
    _fails_with("open('/tmp/big', 'wb').write(bytes(40 * 2**20))", "File too large")
    code = "for i in range(9):\n with open(f'/tmp/{i}', 'wb') as file: file.write(bytes(15 * 2**20))"
    _fails_with(code, "No space left")


def test_endless_output_is_cut_and_ends_the_run() -> None:
    outcome = _run("while True: print('x' * 1000)")
    assert outcome.ended == "output"
    assert len(outcome.output) == ENOUGH.output_bytes


def test_no_process_and_no_thread_can_be_started() -> None:
    _fails_with("import os; os.fork()", "BlockingIOError")
    _fails_with("import threading; threading.Thread(target=print).start()", "can't start new thread")


def test_a_fork_bomb_ends_with_all_of_its_processes() -> None:
    bomb = """
        import os, time
        while True:
            try:
                os.fork()
            except OSError:
                time.sleep(0.05)
    """
    outcome = _run(bomb, Limits(timeout_seconds=0.5, processes=12))
    assert outcome.ended == "timeout" or outcome.exit_code == -signal.SIGKILL


def test_the_number_of_processes_is_limited() -> None:
    code = """
        import os, time
        for count in range(50):
            try:
                if os.fork() == 0:
                    time.sleep(60)
            except OSError:
                break
        print(count + 1)
    """
    assert _run(code, replace(ENOUGH, processes=5)).output == "5\n"


def test_a_process_in_a_session_of_its_own_does_not_outlive_the_run() -> None:
    code = """
        import os, signal, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                time.sleep(600)
            os._exit(0)
        os.wait()
        print("gone")
    """
    outcome = _run(code, replace(ENOUGH, processes=5))
    assert (outcome.ended, outcome.output) == ("exited", "gone\n")


def test_no_process_outside_can_be_seen_or_signalled() -> None:
    _fails_with(f"import os; os.kill({os.getpid()}, 9)", "ProcessLookupError")
    assert _run("import os; print(os.getpid(), os.getppid())").output == "1 0\n"
    assert _run("import os; os.kill(-1, 9); os.kill(os.getppid(), 9); print('still here')", SHORT).ended in (
        "exited",
        "timeout",
    )
    _fails_with("import os; os.listdir('/proc')", "FileNotFoundError")


def test_files_outside_cannot_be_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    secret.chmod(0o666)
    for path in (secret, Path.home() / ".graft", Path.home() / ".bashrc", "/etc/passwd", "/proc/1/environ", __file__):
        _fails_with(f"open({str(path)!r})", "FileNotFoundError")


def test_nothing_outside_its_folder_can_be_written() -> None:
    for path in ("/x", "/usr/lib/x", f"{os.path.dirname(os.__file__)}/x", "/dev/x"):
        outcome = _run(f"open({path!r}, 'w')")
        assert "Read-only file system" in outcome.output or "Permission denied" in outcome.output
    assert not Path("/tmp/of-the-sandbox").exists()
    assert _run("open('/tmp/of-the-sandbox', 'w'); import os; print(os.getcwd(), os.listdir())").output == (
        "/tmp ['of-the-sandbox']\n"
    )
    assert not Path("/tmp/of-the-sandbox").exists()


def test_a_listening_socket_of_this_machine_cannot_be_reached(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind(str(tmp_path / "s"))
        local.listen()
        port = server.getsockname()[1]
        _fails_with(f"import socket; socket.create_connection(('127.0.0.1', {port}))", "PermissionError")
        _fails_with(f"import socket; socket.socket(socket.AF_UNIX).connect({str(tmp_path / 's')!r})", "PermissionError")
        _fails_with("import socket; socket.socket(socket.AF_VSOCK)", "PermissionError")
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_calls_that_would_open_the_place_again_are_refused() -> None:
    code = """
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        libc.syscall.restype = ctypes.c_long
        for call in ((272, 0x10000000), (56, 0x10000011, 0, 0, 0, 0), (165, 0, b"/tmp", b"tmpfs", 0, 0), (425, 8, 0)):
            print(libc.syscall(*map(lambda x: ctypes.c_long(x) if isinstance(x, int) else x, call)), ctypes.get_errno())
    """
    if os.uname().machine != "x86_64":
        pytest.skip("the numbers are those of x86-64")
    assert _run(code).output == "-1 1\n" * 4


def test_it_is_nobody_and_inherits_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    code = """
        import os, sys
        fds = []
        for fd in range(4096):
            try:
                os.fstat(fd)
                fds.append(fd)
            except OSError:
                pass
        print(os.getresuid(), os.getresgid(), sorted(os.environ), fds, sys.stdin.read() == "", os.getgroups()[1:])
    """
    try:
        outcome = _run(code)
    finally:
        os.close(reading)
        os.close(writing)
    ids = (65534,) * 3
    # Python itself sets LC_CTYPE where no locale is.
    assert outcome.output == f"{ids} {ids} ['HOME', 'LC_CTYPE', 'PATH'] [0, 1, 2, 3, 4] True []\n"


def test_code_ends_when_the_process_that_asked_for_it_is_killed() -> None:
    caller = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from graft.grading.sandbox import *; run_python(sys.argv[1], '', Limits(timeout_seconds=60))",
            f"{MARK}\nimport time; time.sleep(600)",
        ]
    )
    try:
        _wait(lambda: any(process.pid != caller.pid for process in _left()))
    finally:
        caller.kill()
        caller.wait()
    _wait(lambda: not _left())


def test_where_namespaces_are_refused_nothing_runs(tmp_path: Path) -> None:
    script = tmp_path / "refused.py"
    script.write_text(
        "open('/proc/sys/user/max_user_namespaces', 'w').write('0')\n"
        "from graft.grading.sandbox import *\n"
        "from graft.domain.errors import FailedPrecondition\n"
        "try: run_python('import os; os.write(4, b\"ran\")', '')\n"
        "except FailedPrecondition as error: print(error.reason, error)\n"
    )
    printed = _in_user_namespace(str(script), "--map-root-user")
    assert printed.startswith("SANDBOX_UNAVAILABLE The sandbox for Python cannot work here, so that no code was run")
    assert "No space left" in printed  # how the kernel says that the number of namespaces is used up


def test_a_user_who_is_not_root_gets_the_same_place(tmp_path: Path) -> None:
    script = tmp_path / "user.py"
    script.write_text(
        "import os\n"
        "from graft.grading.sandbox import *\n"
        "outcome = run_python('import os; print(os.getresuid(), sorted(os.listdir(\"/tmp\")), os.getpid())', '')\n"
        "print(os.geteuid(), outcome)\n"
        "print(run_python('open(\"/x\", \"w\")', '').output.splitlines()[-1])\n"
    )
    first, second = _in_user_namespace(str(script), "--map-user=1000", "--map-group=1000").splitlines()
    assert first.startswith("1000 Outcome(ended='exited', exit_code=0, output='(65534, 65534, 65534) [] 1\\n'")
    assert "Read-only file system" in second


def _in_user_namespace(script: str, *mapping: str) -> str:
    return subprocess.run(
        ["unshare", "--user", *mapping, sys.executable, script],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout


def _wait(done: object, seconds: float = 10) -> None:
    assert callable(done)
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)
