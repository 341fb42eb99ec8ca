"""Graft's whole local stack for a benchmark: a home and ports of its own, started by `graft up`, always ended.

Knows nothing of what is measured.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.ports import free_ports
from tests.support.serving_stack import descendants

from benchmarks.common import BASE, CACHE, console, temporary_folder
from graft.client import Connection
from graft.registry.mlflow_registry import Publication, Registry
from graft.settings import Settings, load

PORTS = (
    "GRAFT_RAY_PORT",
    "GRAFT_RAY_DASHBOARD_PORT",
    "GRAFT_REGISTRY_PORT",
    "GRAFT_SERVING_GRPC_PORT",
    "GRAFT_GATEWAY_GRPC_PORT",
    "GRAFT_GATEWAY_HTTP_PORT",
)


@dataclass(frozen=True)
class Stack:
    """A stack that is up."""

    settings: Settings
    start_seconds: float
    """From the call of `graft up` to its return."""

    @property
    def connection(self) -> Connection:
        """For Graft's clients."""
        gateway = self.settings.gateway
        return Connection(address=f"{gateway.host}:{gateway.grpc_port}", api_key="", project="default")

    @property
    def http(self) -> str:
        """The OpenAI-compatible base URL."""
        return f"http://{self.settings.gateway.host}:{self.settings.gateway.http_port}/v1"

    def idle_cores(self, seconds: float = 5.0) -> float:
        """Cores that the stack keeps busy while nobody asks anything of it."""
        processes = descendants(self.settings.home.path)
        before = {process: sum(process.cpu_times()[:2]) for process in processes}
        time.sleep(seconds)
        return sum(sum(process.cpu_times()[:2]) - busy for process, busy in before.items()) / seconds


@contextmanager
def graft_stack(variables: dict[str, str], base_folder: Path | None = None) -> Iterator[Stack]:
    """`graft up` with SmolLM2-135M, or with the model of `base_folder`; `variables` are further settings.

    Raises CalledProcessError when it does not come up; its output and the last lines of its logs are shown.
    """
    with temporary_folder() as home:
        base = BASE
        if base_folder is not None:
            base = base_folder.name
            (home / "base_models.yaml").write_text(f"{base}: {{folder: {base_folder}, license: none}}\n")
        ports = dict(zip(PORTS, map(str, free_ports(len(PORTS))), strict=True))
        ours = {"GRAFT_HOME": str(home), "GRAFT_CACHE": str(CACHE), "GRAFT_SERVING_BASE_MODEL": base}
        ours |= ports | variables
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("GRAFT_")}
        environment = {**inherited, **ours, "GRAFT_TEST_STACK": str(home)}

        def command(*arguments: str) -> None:
            run = subprocess.run(
                [sys.executable, "-m", "graft.cli.main", *arguments], env=environment, capture_output=True, text=True
            )
            if run.returncode:
                console.print(run.stdout, run.stderr, markup=False)
                for log in sorted((home / "logs").glob("*.log")):
                    console.print(f"{log.name}: {log.read_text(errors='replace')[-1500:]}", markup=False)
                run.check_returncode()

        started = time.perf_counter()
        try:
            with console.status(f"Starting Graft's stack with {base}"):
                command("up", "--detach")
            yield Stack(load(ours), time.perf_counter() - started)
        finally:
            with console.status("Stopping Graft's stack"):
                command("down")
            if left := descendants(home):
                for process in left:
                    process.kill()
                raise RuntimeError(f"`graft down` has left {len(left)} processes, which are ended now.")


def publish(registry: Registry, base: str, base_digest: str, adapter: str, folder: Path) -> float:
    """Registers an adapter as a version, as the orchestrator does; returns the version's creation, Unix seconds."""
    job = f"benchmark-{adapter}"
    run_id = registry.start_run("default", job, 1, {}, {})
    version = registry.publish(
        Publication(
            project="default",
            base_model=base,
            adapter=adapter,
            job_id=job,
            attempt=1,
            run_id=run_id,
            folder=folder,
            base_model_digest=base_digest,
            dataset_digest="sha256:none",
            rank=8,
            metrics={},
        )
    )
    return version.create_time.timestamp()
