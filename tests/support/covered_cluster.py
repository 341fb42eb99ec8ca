"""A Ray cluster of two nodes that is reached by Ray Client, and servers, where no two parts share a disk.

The nodes, `a` and `b`, have a CPU and a home each, and see neither the other's nor what is `outside`: these folders are
covered in their mount namespaces, which takes root. Files go through a bucket. Does not know what runs there.
"""

import asyncio
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import s3fs

from tests.support.mlflow_server import mlflow_server
from tests.support.ports import free_port
from tests.support.processes import listening, process
from tests.support.s3_server import S3Server, s3_server

GRACE_SECONDS = 5
"""How long Ray Client goes on without its link: enough for one that is whole again, and only waited for beyond that."""


@dataclass(frozen=True)
class CoveredCluster:
    """Where everything is. This process has the bucket's credentials in its environment."""

    root: Path
    s3: S3Server
    tracking_uri: str
    head: int
    """Process id of the head node."""
    client_port: int
    environment: dict[str, str]
    """Of a process outside that uses the cluster."""

    @property
    def outside(self) -> Path:
        """The home of a process outside."""
        return self.root / "outside"

    def home(self, node: str) -> Path:
        """Of a node."""
        return self.root / node

    def sessions(self) -> list[psutil.Process]:
        """The processes on the head that stand for a client each."""
        found = []
        for child in psutil.Process(self.head).children(recursive=True):
            try:
                if "--mode=specific-server" in " ".join(child.cmdline()):
                    found.append(child)
            except psutil.NoSuchProcess:
                continue
        return found


@contextmanager
def covered_cluster(mlflow_database: str) -> Iterator[CoveredCluster]:
    """Starts it all, and ends it. Skips aloud where folders cannot be covered, and fails there in CI."""
    # Not pytest's: Ray's sockets lie below it, and a socket's path has 107 characters at most.
    root = Path(tempfile.mkdtemp(prefix="graft-"))
    homes = {name: root / name for name in ("outside", "a", "b")}
    for home in homes.values():
        home.mkdir()
    ray_port, client_port = free_port(), free_port()
    # Loopback's, and small.
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1"]
    start += ["--node-ip-address=127.0.0.1", "--object-store-memory=100000000", "--disable-usage-stats"]
    as_head = ["--head", f"--port={ray_port}", f"--ray-client-server-port={client_port}", "--include-dashboard=false"]
    with s3_server() as s3, pytest.MonkeyPatch.context() as patch:
        for name, value in s3.variables.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GRAFT_")}
        environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_CLIENT_RECONNECT_GRACE_PERIOD": str(GRACE_SECONDS)}
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        head = _covered([homes["outside"], homes["b"]], [*start, *as_head, f"--temp-dir={root / 'ray'}"])
        node = _covered([homes["outside"], homes["a"]], [*start, f"--address=127.0.0.1:{ray_port}"])
        bucket = {
            "GRAFT_REGISTRY_BACKEND_STORE_URI": mlflow_database,
            "GRAFT_REGISTRY_ARTIFACTS_DESTINATION": "s3://graft/mlflow",
            "GRAFT_STORAGE_URL": "s3://graft/main",
            "GRAFT_STORAGE_ENDPOINT_URL": s3.endpoint_url,
        }
        with (
            process(head, {**environment, "GRAFT_HOME": str(homes["a"])}, root / "head.log") as running,
            process(node, {**environment, "GRAFT_HOME": str(homes["b"])}, root / "node.log"),
            mlflow_server(root / "mlflow", **bucket) as uri,
        ):
            asyncio.run(listening(client_port, root / "head.log", 180))
            yield CoveredCluster(root, s3, uri, running.pid, client_port, environment)
    shutil.rmtree(root, ignore_errors=True)


def _covered(folders: list[Path], command: list[str]) -> list[str]:
    """The command, for which nothing is in these folders."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0:
        reason = "covering folders takes root and unshare (Debian: util-linux)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    covers = " && ".join(f"mount -t tmpfs none {folder}" for folder in folders)
    return ["unshare", "--mount", "sh", "-c", f'{covers} && exec "$@"', "sh", *command]
