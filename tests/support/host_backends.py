"""PostgreSQL, an S3 server and MLflow on a host of `tests.support.hosts`; they end with it.

The same programs as `tests.support.postgres`, `s3_server` and `mlflow_server` start on loopback.
"""

import os
import sys

from tests.support.hosts import SUBNET, Host
from tests.support.postgres import postgres_binary
from tests.support.s3_server import S3Server, rclone

POSTGRES_PORT, S3_PORT, MLFLOW_PORT = 5432, 9100, 5000


def start_postgres(host: Host, *databases: str) -> list[str]:
    """A server with these databases; returns their URLs. It asks for no password."""
    initdb, server, createdb, ready = (
        postgres_binary(name) for name in ("initdb", "postgres", "createdb", "pg_isready")
    )
    folder = host.disk / "postgres"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    nobody = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]  # it refuses to run as root
    data = str(host.here / "postgres" / "data")
    host.run([*nobody, initdb, "-D", data, "--username=graft", "--auth=trust", "--no-sync", "--encoding=UTF8"])
    with open(folder / "data" / "pg_hba.conf", "a") as allowed:
        allowed.write(f"host all all {SUBNET}.0/24 trust\n")
    addresses = f"{host.address},127.0.0.1"
    host.popen(
        [*nobody, server, "-D", data, "-p", str(POSTGRES_PORT), "-k", data, "-h", addresses, "-c", "fsync=off"],
        "postgres.log",
    )
    host.listening(POSTGRES_PORT)
    where = ["-h", host.address, "-p", str(POSTGRES_PORT), "-U", "graft"]
    # The port is open a moment before sessions are taken.
    host.run(["sh", "-c", 'until "$@"; do sleep 0.1; done', "sh", ready, *where])
    for name in databases:
        host.run([createdb, *where, name])
    return [f"postgresql+psycopg://graft@{host.address}:{POSTGRES_PORT}/{name}" for name in databases]


def start_s3(host: Host, bytes_a_second: str = "off") -> S3Server:
    """A server with one bucket, `graft`, whose objects are files of the host's disk. `bytes_a_second` as in `10M`."""
    (host.disk / "buckets" / "graft").mkdir(parents=True)
    server = S3Server(f"http://{host.address}:{S3_PORT}", host.disk / "buckets")
    host.popen(
        [
            *(rclone(), "serve", "s3", str(host.here / "buckets"), "--addr", f"{host.address}:{S3_PORT}"),
            *("--auth-key", f"{server.key},{server.secret}", "--config", os.devnull),
            *("--bwlimit", bytes_a_second),
        ],
        "s3.log",
    )
    host.listening(S3_PORT)
    return server


def start_mlflow(host: Host, database: str, s3: S3Server) -> str:
    """A server whose artifacts are in the bucket; returns its URI. `listening` tells when it answers."""
    host.popen(
        [sys.executable, "-m", "graft.registry.main"],
        "mlflow.log",
        {
            **s3.variables,
            "GRAFT_REGISTRY_HOST": host.address,
            "GRAFT_REGISTRY_PORT": str(MLFLOW_PORT),
            "GRAFT_REGISTRY_BACKEND_STORE_URI": database,
            "GRAFT_REGISTRY_ARTIFACTS_DESTINATION": "s3://graft/mlflow",
            "GRAFT_STORAGE_URL": "s3://graft/main",
            "GRAFT_STORAGE_ENDPOINT_URL": s3.endpoint_url,
        },
    )
    return f"http://{host.address}:{MLFLOW_PORT}"
