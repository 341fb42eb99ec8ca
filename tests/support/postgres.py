"""A real PostgreSQL server for tests: its own folder, its own port, ended with the test session."""

import glob
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from tests.support.ports import free_port

START_SECONDS = 60.0
"""Tells a start from a hang: it takes a second."""


def postgres_binary(name: str) -> str:
    """One of PostgreSQL's programs. Skips aloud where it is missing, and fails there in CI."""
    versioned = sorted(glob.glob(f"/usr/lib/postgresql/*/bin/{name}"))
    found = versioned[-1] if versioned else shutil.which(name)
    if found is None:
        reason = "PostgreSQL's server is missing (Debian: apt-get install postgresql)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def _answers(port: int) -> bool:
    """Whether sessions are taken: the port is open a moment before."""
    try:
        psycopg.connect(host="127.0.0.1", port=port, user="graft", dbname="postgres", connect_timeout=10).close()
    except psycopg.OperationalError:
        return False
    return True


@contextmanager
def postgres_server(*, durable: bool = False) -> Iterator[str]:
    """Yields the SQLAlchemy URL of an empty server. Its commits wait for the disk only when `durable`."""
    initdb, server = postgres_binary("initdb"), postgres_binary("postgres")
    folder = Path(tempfile.mkdtemp(prefix="graft-postgres-"))
    # PostgreSQL refuses to run as root.
    user = {} if os.geteuid() != 0 else {"user": pwd.getpwnam("nobody").pw_uid, "group": pwd.getpwnam("nobody").pw_gid}
    if user:
        os.chown(folder, user["user"], user["group"])
    data, port = folder / "data", free_port()
    fsync = f"fsync={'on' if durable else 'off'}"
    process = None
    try:
        subprocess.run(
            [initdb, "--pgdata", str(data), "--username=graft", "--auth=trust", "--no-sync", "--encoding=UTF8"],
            check=True,
            capture_output=True,
            cwd=folder,
            **user,  # type: ignore[call-overload]
        )
        with open(folder / "log", "wb") as log:
            process = subprocess.Popen(
                [server, "-D", str(data), "-p", str(port), "-k", str(folder), "-h", "127.0.0.1", "-c", fsync],
                stdout=log,
                stderr=log,
                cwd=folder,
                **user,  # type: ignore[call-overload]
            )
        deadline = time.monotonic() + START_SECONDS
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"PostgreSQL did not start: {(folder / 'log').read_text()}")
            time.sleep(0.05)
        yield f"postgresql+psycopg://graft@127.0.0.1:{port}/postgres"
    finally:
        if process is not None:
            process.send_signal(signal.SIGINT)  # SIGTERM would wait for whoever is still connected
            process.wait(timeout=30)
        shutil.rmtree(folder)
