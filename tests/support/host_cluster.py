"""The whole system on hosts of its own, as an operator would spread it; nothing is shared but the network.

    store    PostgreSQL, S3, MLflow          gate    gateway
    head     Ray's head, inference           orch    orchestrator
    node     a Ray node                      laptop  who asks

`head` and `node` have a CPU each for training, and one replica each. Does not know what is cut.
"""

import json
import secrets
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import openai
import psutil

from graft.client import Connection, Graft
from graft.domain.errors import GraftError
from graft.registry.mlflow_registry import Publication, Registry
from tests.support.adapters import make_adapter
from tests.support.host_backends import MLFLOW_PORT, S3_PORT, start_mlflow, start_postgres, start_s3
from tests.support.hosts import Host, network
from tests.support.tiny_jobs import BASE, known_to_the_gateway
from tests.support.tiny_llama import make_tiny_llama
from tests.support.whole_stack import eventually

T = TypeVar("T")

RAY_PORT, CLIENT_PORT, ENGINE_PORT, GRPC_PORT, HTTP_PORT = 6379, 10001, 9000, 50051, 8080
RAY_PATIENCE = {
    # Ray's own are 3 s, 10 s and 5 times: it takes a minute to give up a host. The tests do not have five of them.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "4000",
    "RAY_health_check_failure_threshold": "4",
    # How long Ray Client tries to go on with its session: half a minute.
    "RAY_CLIENT_RECONNECT_GRACE_PERIOD": "5",
}
S3_BYTES_A_SECOND = "15M"
"""Adapters take no time; a file of 60 MB beside one takes four seconds."""


@dataclass
class HostCluster:
    """What runs, and who asks it."""

    hosts: dict[str, Host]
    variables: dict[str, str]
    graft: Graft
    openai: openai.OpenAI
    tracking_uri: str
    """MLflow, from this process."""
    base: Path

    def host(self, name: str) -> Host:
        """One of them."""
        return self.hosts[name]

    def hosts_with(self, title: str) -> set[str]:
        """Names of the hosts on which a process has this in its title: Ray names each after what it runs."""
        return {name for name in ("head", "node") if any(title in found for found in self.hosts[name].titles())}

    def orchestrator(self) -> psutil.Process:
        """The process that runs jobs."""
        running = self.hosts["orch"].processes().items()
        found = [process for process, arguments in running if arguments[1:] == ["-m", "graft.orchestrator.main"]]
        # A child is a copy of it until it has become another program.
        return min(found, key=psutil.Process.create_time)

    def engine_cores(self) -> list[psutil.Process]:
        """The processes that run the model, one of each replica."""
        return self._titled("EngineCore")

    def training_workers(self) -> list[psutil.Process]:
        """Ray Train's, of all jobs."""
        return self._titled("RayTrainWorker")

    def _titled(self, title: str) -> list[psutil.Process]:
        running = [item for name in ("head", "node") for item in self.hosts[name].processes().items()]
        return [process for process, arguments in running if title in " ".join(arguments)]

    def start_head(self) -> None:
        """Ray's head on the host `head`."""
        head = self.hosts["head"]
        head.popen(
            [
                *(*_ray_start(head), "--head", f"--port={RAY_PORT}", f"--ray-client-server-port={CLIENT_PORT}"),
                *("--include-dashboard=false", f"--temp-dir={head.here / 'ray'}"),
            ],
            "ray.log",
            self.variables,
        )

    def replace_head(self) -> None:
        """Another machine in the place of `head`, which was killed: the same address, and an empty disk."""
        head = self.hosts["head"]
        for folder in ("ray", "home/cache", "tmp"):
            shutil.rmtree(head.disk / folder, ignore_errors=True)
        (head.disk / "tmp").mkdir()
        (head.disk / "tmp").chmod(0o1777)
        head.heal()
        self.start_head()
        self.start_inference()

    def start_node(self) -> None:
        """Ray on the host `node`, again and again."""
        node = self.hosts["node"]
        address = f"--address={self.hosts['head'].address}:{RAY_PORT}"
        node.popen(_again([*_ray_start(node), address]), "ray.log", self.variables)

    def start_inference(self) -> None:
        """What puts the inference application on Ray, on the host `head`."""
        head = self.hosts["head"]
        serving = {
            **{name: value for name, value in self.variables.items() if name != "GRAFT_SERVING_ADDRESS"},
            "GRAFT_ORCHESTRATOR_RAY_ADDRESS": f"{head.address}:{RAY_PORT}",
            "GRAFT_SERVING_HOST": head.address,
            "GRAFT_SERVING_NUM_REPLICAS": "2",
            "GRAFT_SERVING_MAX_REPLICAS_PER_NODE": "1",
            # Answers of two replicas are compared: in bfloat16 near-ties fall either way.
            "GRAFT_SERVING_DTYPE": "float32",
        }
        head.popen(_again(_python("graft.serving.main")), "serving.log", serving)

    def replicas(self) -> list[Any]:
        """Those that are ready."""
        return [replica for replica in self.graft.residency() if replica.ready]

    def wait_for_replicas(self, seconds: float) -> None:
        """Until both hosts answer."""
        eventually(
            lambda: patient(self.replicas) or [], lambda found: len(found) == 2, seconds, "two replicas are ready"
        )

    def publish(self, adapter: str, beside_bytes: int) -> None:
        """Registers an adapter of random weights with a file of so many bytes beside it; the gateway knows it then."""
        cache = self.hosts["laptop"].disk / "registry"
        # Weights of its own: of two adapters that are the same, a host fetches one.
        folder = make_adapter(self.base, cache / adapter, seed=zlib.crc32(adapter.encode()))
        with open(folder / "notes.txt", "wb") as file:
            file.truncate(beside_bytes)
        registry = Registry(self.tracking_uri, cache)
        version = registry.publish(
            Publication(
                project="default",
                base_model=BASE,
                adapter=adapter,
                job_id=adapter,
                attempt=1,
                run_id=registry.start_run("default", adapter, 1, {}, {}),
                folder=folder,
                base_model_digest="",
                dataset_digest="",
                rank=8,
                metrics={},
            )
        )
        known_to_the_gateway(self.graft, version)

    def last_lines(self) -> str:
        """The ends of all logs."""
        return "\n".join(host.last_lines() for host in self.hosts.values())


def patient(ask: Callable[[], T]) -> T | None:
    """The answer, or None instead of an error that says to try again. Any other is raised."""
    try:
        return ask()
    except GraftError as error:
        if error.code != "UNAVAILABLE":
            raise
        return None


def seconds_until(ask: Callable[[], object], seconds: float, what: str) -> float:
    """How long it takes until the answer is there."""
    started = time.monotonic()
    eventually(lambda: patient(ask), lambda answer: answer is not None, seconds, what)
    return time.monotonic() - started


def _ray_start(host: Host) -> list[str]:
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1", "--disable-usage-stats"]
    return [*start, f"--node-ip-address={host.address}", "--object-store-memory=100000000"]


def _python(module: str) -> Sequence[str]:
    return [sys.executable, "-m", module]


def _again(command: Sequence[str]) -> list[str]:
    """The command as systemd would run it, which starts again what has ended."""
    return ["sh", "-c", 'while :; do "$@"; sleep 1; done', "sh", *command]


@contextmanager
def host_cluster() -> Iterator[HostCluster]:
    """Starts it all and waits until both replicas are ready. Skips aloud where there can be no hosts."""
    with network("store", "head", "node", "orch", "gate", "laptop") as hosts:
        store, head, orch, gate, laptop = (hosts[name] for name in ("store", "head", "orch", "gate", "laptop"))
        store_url, mlflow_url = start_postgres(store, "graft", "mlflow")
        s3 = start_s3(store, S3_BYTES_A_SECOND)
        uri = start_mlflow(store, mlflow_url, s3)
        base = make_tiny_llama(orch.disk / "base")
        shutil.copytree(base, head.disk / "base")  # `node` fetches it
        for host in (orch, head):
            catalogue = {BASE: {"folder": str(host.here / "base"), "license": "Apache-2.0"}}
            (host.disk / "home" / "base_models.yaml").write_text(json.dumps(catalogue))
        key = secrets.token_urlsafe(24)
        (gate.disk / "key").write_text(key)
        variables = {
            **s3.variables,
            **RAY_PATIENCE,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "GRAFT_STORE_URL": store_url,
            "GRAFT_STORAGE_URL": "s3://graft/main",
            "GRAFT_STORAGE_ENDPOINT_URL": s3.endpoint_url,
            "GRAFT_REGISTRY_TRACKING_URI": uri,
            "GRAFT_SERVING_BASE_MODEL": BASE,
            "GRAFT_SERVING_ADDRESS": f"{head.address}:{ENGINE_PORT}",
            "GRAFT_ORCHESTRATOR_RAY_ADDRESS": f"ray://{head.address}:{CLIENT_PORT}",
            "GRAFT_GATEWAY_HOST": gate.address,
            "GRAFT_GATEWAY_INITIAL_KEY_FILE": str(gate.here / "key"),
        }
        gate.popen(_python("graft.gateway.main"), "gateway.log", variables)
        gate.listening(GRPC_PORT, 180)
        grpc_port, http_port = laptop.tunnel(gate, GRPC_PORT), laptop.tunnel(gate, HTTP_PORT)
        url = f"http://127.0.0.1:{http_port}/v1"
        with (
            Graft(Connection(address=f"127.0.0.1:{grpc_port}", api_key=key, project="default")) as graft,
            openai.OpenAI(base_url=url, api_key=key, max_retries=0) as client,
        ):
            mlflow = f"http://127.0.0.1:{laptop.tunnel(store, MLFLOW_PORT)}"
            cluster = HostCluster(hosts, variables, graft, client, mlflow, base)
            cluster.start_head()
            head.listening(RAY_PORT, 180)
            cluster.start_node()
            head.listening(CLIENT_PORT, 180)
            cluster.start_inference()
            store.listening(MLFLOW_PORT, 180)
            # Ray's head accepts sessions a moment before it can start their drivers.
            orch.popen(_again(_python("graft.orchestrator.main")), "orchestrator.log", variables)
            try:
                cluster.wait_for_replicas(400)
                eventually(graft.base_models, bool, 120, "the orchestrator has told of the base model")
            except BaseException:
                print(cluster.last_lines())
                raise
            yield cluster


__all__ = ["BASE", "S3_PORT", "HostCluster", "host_cluster", "patient", "seconds_until"]
