"""A job where no two parts share a disk: store and MLflow on PostgreSQL, files in a bucket, Ray reached by its client.

The two nodes of the Ray cluster each have a home of their own and see neither the other's nor the orchestrator's: these
are covered in their mount namespaces, which takes root. The engine is a stand-in that scores with PEFT.
"""

import asyncio
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import s3fs
from sqlalchemy import create_engine, make_url, text

from graft.domain.jobs import Hyperparameters, JobSpec, JobState
from graft.gateway.uploads import Upload
from graft.orchestrator.context import stored_events
from graft.registry.mlflow_registry import Registry
from graft.settings import load
from graft.stack.backends import check_ray
from graft.stack.machine import State
from graft.storage import open_storage
from graft.store.sql import migrate, open_store
from tests.support.mlflow_server import mlflow_server
from tests.support.orchestrator_process import BASE, ScoringEngine, listening, process, served, until
from tests.support.postgres import free_port
from tests.support.s3_server import s3_server
from tests.support.tiny_llama import make_tiny_llama

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

STEPS = 300
ROWS = "".join(json.dumps({"prompt": f"Number {n}?", "completion": f" {n * 7}"}) + "\n" for n in range(40)).encode()


@pytest.fixture
def root() -> Iterator[Path]:
    # Not tmp_path: Ray's sockets lie below it, and a socket's path has 107 characters at most.
    folder = Path(tempfile.mkdtemp(prefix="graft-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def _covered(folders: list[Path], command: list[str]) -> list[str]:
    """The command, for which nothing is in these folders. Skips aloud where that cannot be done, fails there in CI."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0:
        reason = "covering folders takes root and unshare (Debian: util-linux)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    covers = " && ".join(f"mount -t tmpfs none {folder}" for folder in folders)
    return ["unshare", "--mount", "sh", "-c", f'{covers} && exec "$@"', "sh", *command]


def _databases(server: str, *names: str) -> list[str]:
    engine = create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for name in names:
            connection.execute(text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return [make_url(server).set(database=name).render_as_string(hide_password=False) for name in names]


def _sessions(head: int) -> list[psutil.Process]:
    """The processes on the head that stand for a client each."""
    found = []
    for child in psutil.Process(head).children(recursive=True):
        try:
            if "--mode=specific-server" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


async def test_a_job_trains_on_two_hosts_while_its_orchestrator_restarts_and_loses_its_link(
    root: Path, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    homes = {name: root / name for name in ("orchestrator", "a", "b")}
    for home in homes.values():
        home.mkdir()
    base = make_tiny_llama(homes["orchestrator"] / "tiny")
    (homes["orchestrator"] / "base_models.yaml").write_text(json.dumps({BASE: {"folder": str(base)}}))
    store_url, mlflow_url = _databases(postgres, "graft_hosts", "mlflow_hosts")
    migrate(store_url)
    with s3_server() as s3:
        for name, value in s3.variables.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        monkeypatch.setenv("GRAFT_STORAGE_URL", "s3://graft/main")
        monkeypatch.setenv("GRAFT_STORAGE_ENDPOINT_URL", s3.endpoint_url)
        monkeypatch.setenv("GRAFT_REGISTRY_BACKEND_STORE_URI", mlflow_url)
        monkeypatch.setenv("GRAFT_REGISTRY_ARTIFACTS_DESTINATION", "s3://graft/mlflow")
        with mlflow_server(root / "mlflow") as uri:
            ray_port, client_port, engine_port = free_port(), free_port(), free_port()
            graft = {
                "GRAFT_HOME": str(homes["orchestrator"]),
                "GRAFT_SERVING_BASE_MODEL": BASE,
                "GRAFT_SERVING_ADDRESS": f"127.0.0.1:{engine_port}",
                "GRAFT_REGISTRY_TRACKING_URI": uri,
                "GRAFT_STORE_URL": store_url,
                "GRAFT_STORAGE_URL": "s3://graft/main",
                "GRAFT_STORAGE_ENDPOINT_URL": s3.endpoint_url,
                "GRAFT_ORCHESTRATOR_RAY_ADDRESS": f"ray://127.0.0.1:{client_port}",
            }
            settings = load(graft)
            plain = {name: value for name, value in os.environ.items() if not name.startswith("GRAFT_")}
            plain |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
            start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1"]
            start += ["--node-ip-address=127.0.0.1", "--object-store-memory=100000000", "--disable-usage-stats"]
            head_command = _covered(
                [homes["orchestrator"], homes["b"]],
                [
                    *(*start, "--head", f"--port={ray_port}", f"--ray-client-server-port={client_port}"),
                    *("--include-dashboard=false", f"--temp-dir={root / 'ray'}"),
                ],
            )
            node_command = _covered([homes["orchestrator"], homes["a"]], [*start, f"--address=127.0.0.1:{ray_port}"])
            command = [sys.executable, "-m", "graft.orchestrator.main"]
            log = root / "orchestrator.log"
            store = open_store(store_url)
            async with Upload(store, settings, "default", "rows.jsonl", None) as upload:
                await upload.write(ROWS)
                dataset = await upload.finish()
            asked = Hyperparameters(max_steps=STEPS, batch_size=4, num_workers=2, checkpoint_steps=100)
            await store.create_job(
                "default", "job-1", JobSpec(BASE, dataset.id, suffix="sums", hyperparameters=asked), None
            )
            environment = {**plain, **graft}
            with (
                process(head_command, {**plain, "GRAFT_HOME": str(homes["a"])}, root / "head.log") as head,
                process(node_command, {**plain, "GRAFT_HOME": str(homes["b"])}, root / "node.log"),
            ):
                await listening(client_port, root / "head.log", 180)
                with process(command, environment, log) as first:
                    await until(store, JobState.RUNNING, first, log, 400)
                    first.terminate()
                    assert await asyncio.to_thread(first.wait, 60) == 0, log.read_text()[-3000:]
                engine = ScoringEngine(base, Registry(uri, root / "engine"))
                with process(command, environment, log) as second:
                    while not any('"job_adopted"' in line for line in log.read_text().splitlines()):
                        assert second.poll() is None, log.read_text()[-3000:]
                        await asyncio.sleep(0.1)
                    # Nothing is left of its session, as after a long time without the network.
                    for session in await asyncio.to_thread(_sessions, head.pid):
                        session.kill()
                    async with served(engine, engine_port):
                        await until(store, JobState.SUCCEEDED, second, log, 400)
                for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
                    monkeypatch.setenv(name, environment[name])
                trusted = await asyncio.to_thread(check_ray, settings)
                monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
                stranger = await asyncio.to_thread(check_ray, settings)
            nowhere = await asyncio.to_thread(check_ray, settings)
            job = await store.get_job("default", "job-1")
            events = await stored_events(store, job)
            checkpoints = await store.list_checkpoints("default", "job-1")
            storage = open_storage(settings)
            report = storage.read(storage.uri("runs", "job-1", "1", "reports.jsonl")).decode()
            names = storage.names(storage.uri("runs", "job-1", "1", "checkpoints", "step-100"))
            await store.close()
    assert trusted.state is State.OK, trusted
    assert "2 nodes, 2 CPUs" in trusted.message
    assert "token" in stranger.message
    assert "RAY_AUTH_TOKEN" in stranger.fix
    assert "token" not in nowhere.message
    assert "ray_address" in nowhere.fix
    assert (job.attempt, job.fine_tuned_model) == (1, f"{BASE}:sums@1")
    assert job.metrics["parity_max_abs_difference"] < 1e-3
    reports = [event.data["report"] for event in events if "report" in event.data]
    assert reports == sorted(set(reports))
    assert [kept.uri for kept in checkpoints] == [
        f"s3://graft/main/runs/job-1/1/checkpoints/step-{step}" for step in (100, 200)
    ]
    assert "adapter_model.safetensors" in names
    assert json.loads(report.splitlines()[-1])["kind"] == "finished"
    for name in ("a", "b"):  # each host has fetched both for itself
        assert list((homes[name] / "cache" / "base_models").glob("fetched-*/config.json"))
        assert list((homes[name] / "cache" / "storage").glob("*.jsonl"))
