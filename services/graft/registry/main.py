"""The MLflow server of the local stack: tracking, registry and artifacts on SQLite and a folder,
or on the database and the bucket that the settings name.

    python -m graft.registry.main

Becomes `mlflow server`. Exit code 2 when it cannot start, with one sentence.
"""

import os
import socket
import sys

from graft import offline, settings
from graft.domain.errors import GraftError


def main() -> int:
    """Replaces this process by the server; returns only when it cannot."""
    try:
        loaded = settings.load()
    except GraftError as error:
        print(error.message, file=sys.stderr)
        return 2
    host, port = loaded.registry.host, loaded.registry.port
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            print(
                f"MLflow cannot listen on {host}:{port} ({error.strerror}). Set GRAFT_REGISTRY_PORT.", file=sys.stderr
            )
            return 2
    folder = loaded.home.path / "mlflow"
    folder.mkdir(parents=True, exist_ok=True)
    arguments = [
        *(sys.executable, "-m", "mlflow", "server"),
        *("--host", host, "--port", str(port)),
        *("--backend-store-uri", loaded.registry.backend_store_uri or f"sqlite:///{folder / 'mlflow.db'}"),
        *("--artifacts-destination", loaded.registry.artifacts_destination or str(folder / "artifacts")),
        "--serve-artifacts",
        # One worker holds 200 MB; the load is one orchestrator and now and then a person.
        *("--workers", "1"),
    ]
    environment = {**os.environ, **offline.ENVIRONMENT}
    if loaded.storage.endpoint_url:
        environment.setdefault("MLFLOW_S3_ENDPOINT_URL", loaded.storage.endpoint_url)
    # MLflow runs jobs of its own (scorers, judges) in further processes; Graft uses none of them.
    environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    os.execve(sys.executable, arguments, environment)
    return 2


if __name__ == "__main__":
    sys.exit(main())
