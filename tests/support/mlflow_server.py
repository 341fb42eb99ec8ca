"""A real MLflow server for tests, started as the stack starts it."""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.support.ports import free_port
from tests.support.processes import end


@contextmanager
def mlflow_server(home: Path, **settings: str) -> Iterator[str]:
    """Yields the tracking URI of a fresh server below `home`; ends it, and its workers, afterwards.

    `settings` are further GRAFT_* variables.
    """
    port = free_port()
    environment = {**os.environ, "GRAFT_HOME": str(home), "GRAFT_REGISTRY_PORT": str(port), **settings}
    home.mkdir(parents=True, exist_ok=True)
    with open(home / "mlflow.log", "wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "graft.registry.main"],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        uri = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"{uri}/health", timeout=2):
                    break
            except (urllib.error.URLError, OSError):
                assert server.poll() is None, (home / "mlflow.log").read_text()
                assert time.monotonic() < deadline, (home / "mlflow.log").read_text()
                time.sleep(0.2)
        yield uri
    finally:
        family = psutil.Process(server.pid).children(recursive=True) if server.poll() is None else []
        server.terminate()
        try:
            server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        end(family)
