"""A Ray cluster that is reached by its client, where no two parts share a disk: store and MLflow on PostgreSQL, files
in a bucket, an orchestrator that stops and one that loses its link, a link that is cut.

The engine is a stand-in that scores with PEFT.
"""

import asyncio
import json
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, make_url, text

from graft.domain.jobs import Hyperparameters, JobSpec, JobState
from graft.gateway.uploads import Upload
from graft.orchestrator.context import stored_events
from graft.registry.mlflow_registry import Registry
from graft.settings import Settings, load
from graft.stack.backends import check_ray
from graft.stack.machine import State
from graft.storage import Storage, open_storage, share_base_model
from graft.store.sql import SqlStore, migrate, open_store
from tests.support.covered_cluster import CoveredCluster, covered_cluster
from tests.support.ports import free_port
from tests.support.processes import process
from tests.support.run_specs import tiny_run, validated_on
from tests.support.scoring_engine import ScoringEngine, served
from tests.support.tiny_llama import make_tiny_llama

pytestmark = [pytest.mark.integration, pytest.mark.ray, pytest.mark.timeout(900)]

BASE = "tiny"
STEPS = 300
ROWS = "".join(json.dumps({"prompt": f"Number {n}?", "completion": f" {n * 7}"}) + "\n" for n in range(40)).encode()

KNOCKS = {"RAY_CLIENT_INITIAL_CONNECTION_TIMEOUT_S": "1", "RAY_CLIENT_MAX_CONNECTION_TIMEOUT_S": "1"}
"""Ray Client waits 5 s and more for an answer before it looks whether its patience is at an end."""


@pytest.fixture(scope="module")
def databases(postgres: str) -> list[str]:
    """URLs of the store's and MLflow's."""
    engine = create_engine(postgres, isolation_level="AUTOCOMMIT")
    names = ("graft_hosts", "mlflow_hosts")
    with engine.connect() as connection:
        for name in names:
            connection.execute(text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return [make_url(postgres).set(database=name).render_as_string(hide_password=False) for name in names]


@pytest.fixture(scope="module")
def cluster(databases: list[str]) -> Iterator[CoveredCluster]:
    with covered_cluster(databases[1]) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def variables(cluster: CoveredCluster, databases: list[str]) -> dict[str, str]:
    """What an orchestrator outside is told."""
    return {
        "GRAFT_HOME": str(cluster.outside),
        "GRAFT_SERVING_BASE_MODEL": BASE,
        "GRAFT_SERVING_ADDRESS": f"127.0.0.1:{free_port()}",
        "GRAFT_REGISTRY_TRACKING_URI": cluster.tracking_uri,
        "GRAFT_STORE_URL": databases[0],
        "GRAFT_STORAGE_URL": "s3://graft/main",
        "GRAFT_STORAGE_ENDPOINT_URL": cluster.s3.endpoint_url,
        "GRAFT_ORCHESTRATOR_RAY_ADDRESS": f"ray://127.0.0.1:{cluster.client_port}",
    }


@pytest.fixture(scope="module")
def settings(variables: dict[str, str]) -> Settings:
    return load(variables)


async def _until(store: SqlStore, state: JobState, running: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 400
    while (job := await store.get_job("default", "job-1")).state is not state:
        assert job.state not in (JobState.FAILED, JobState.SUCCEEDED), (job.error, log.read_text()[-3000:])
        assert running.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, (job.state, log.read_text()[-3000:])
        await asyncio.sleep(0.05)


@asynccontextmanager
async def _orchestrator(environment: dict[str, str], log: Path) -> AsyncIterator["subprocess.Popen[bytes]"]:
    """One that is ready, started again as long as the cluster starts no session: on a busy machine that takes it more
    time than it is given."""
    while True:
        before = log.stat().st_size if log.exists() else 0
        with process([sys.executable, "-m", "graft.orchestrator.main"], environment, log) as running:
            said = b""
            while b'"orchestrator_ready"' not in said and running.poll() is None:
                await asyncio.sleep(0.1)
                said = log.read_bytes()[before:]
            if running.poll() is None:
                yield running
                return
            assert b'"ray_unreachable"' in log.read_bytes()[before:], log.read_text()[-3000:]


async def test_a_job_trains_on_two_hosts_while_its_orchestrator_restarts_and_loses_its_link(
    cluster: CoveredCluster, variables: dict[str, str], settings: Settings
) -> None:
    base = make_tiny_llama(cluster.outside / "tiny")
    (cluster.outside / "base_models.yaml").write_text(json.dumps({BASE: {"folder": str(base)}}))
    await asyncio.to_thread(migrate, settings.store_url)
    store = open_store(settings.store_url)
    async with Upload(store, settings, "default", "rows.jsonl", None) as upload:
        await upload.write(ROWS)
        dataset = await upload.finish()
    asked = Hyperparameters(max_steps=STEPS, batch_size=4, num_workers=2, checkpoint_steps=100)
    await store.create_job("default", "job-1", JobSpec(BASE, dataset.id, suffix="sums", hyperparameters=asked), None)
    log = cluster.root / "orchestrator.log"
    environment = {**cluster.environment, **variables}
    async with _orchestrator(environment, log) as first:
        await _until(store, JobState.RUNNING, first, log)
        first.terminate()
        assert await asyncio.to_thread(first.wait, 60) == 0, log.read_text()[-3000:]
    assert (await store.get_job("default", "job-1")).lease_owner is None
    engine = ScoringEngine(BASE, base, Registry(cluster.tracking_uri, cluster.root / "engine"))
    async with _orchestrator(environment, log) as second:
        while not any('"job_adopted"' in line for line in log.read_text().splitlines()):
            assert second.poll() is None, log.read_text()[-3000:]
            await asyncio.sleep(0.1)
        # Nothing is left of its session, as after a long time without the network.
        for session in await asyncio.to_thread(cluster.sessions):
            session.kill()
        async with served(engine, int(settings.engine_address.rpartition(":")[2])):
            await _until(store, JobState.SUCCEEDED, second, log)
    job = await store.get_job("default", "job-1")
    events = await stored_events(store, job)
    checkpoints = await store.list_checkpoints("default", "job-1")
    await store.close()
    storage = open_storage(settings)
    report = storage.read(storage.uri("runs", "job-1", "1", "reports.jsonl")).decode()
    names = storage.names(storage.uri("runs", "job-1", "1", "checkpoints", "step-100"))
    assert (job.attempt, job.fine_tuned_model) == (1, f"{BASE}:sums@1")
    assert job.progress is not None
    assert (job.progress.step, job.progress.total_steps) == (STEPS, STEPS)
    assert job.metrics["parity_max_abs_difference"] < 1e-3
    adopted = [json.loads(line) for line in log.read_text().splitlines() if '"job_adopted"' in line]
    assert [(line["job"], line["state"]) for line in adopted] == [("job-1", "RUNNING")]
    reports = [event.data["report"] for event in events if "report" in event.data]
    assert reports == sorted(set(reports))
    assert [kept.uri for kept in checkpoints] == [
        f"s3://graft/main/runs/job-1/1/checkpoints/step-{step}" for step in (100, 200)
    ]
    assert "adapter_model.safetensors" in names
    assert json.loads(report.splitlines()[-1])["kind"] == "finished"
    for node in ("a", "b"):  # each has fetched both for itself
        assert list((cluster.home(node) / "cache" / "base_models").glob("fetched-*/config.json"))
        assert list((cluster.home(node) / "cache" / "storage").glob("*.jsonl"))


def test_a_sweep_leaves_its_best_adapter_in_the_bucket_and_a_cut_link_ends_no_run(
    cluster: CoveredCluster, tmp_path: Path
) -> None:
    storage = Storage("s3://graft/sweep", cluster.s3.endpoint_url)
    base = make_tiny_llama(tmp_path / "base")
    share_base_model(storage, str(base), "sha256:b")
    shutil.rmtree(base)
    uri = storage.uri("datasets", "default", "ds-1.jsonl")
    rows = [{"prompt": f"{n} is ", "completion": "even" if n % 2 == 0 else "odd"} for n in range(40)]
    storage.write(uri, "".join(json.dumps(row) + "\n" for row in rows).encode())
    spec = tiny_run(base, uri, "/nowhere/on/this/host", job_id="ft-none", storage=storage, **validated_on(uri))
    (tmp_path / "spec").write_bytes(pickle.dumps(spec))
    driver = [sys.executable, "-m", "tests.support.ray_client_driver", str(cluster.client_port), str(tmp_path / "spec")]
    environment = {**cluster.environment, **KNOCKS, "GRAFT_HOME": str(tmp_path / "outside")}
    ran = subprocess.run(driver, env=environment, capture_output=True, text=True, timeout=560)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
    found: dict[str, Any] = json.loads(ran.stdout.strip().splitlines()[-1])
    adapter = storage.fetch_folder(storage.uri("runs", "ft-sweep", "1", "adapter"), tmp_path / "adapter")
    left = storage.names(storage.uri("runs", "ft-sweep", "1", "trials", "2"))
    assert found["cpus"] == 2.0
    assert (found["sweep"]["kind"], found["sweep"]["best_trial"]) == ("finished", 1), found["sweep"]
    assert sorted(path.name for path in adapter.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "graft.json",
    ]
    assert any(name.endswith("adapter_model.safetensors") for name in left)
    cuts = found["cuts"]
    assert cuts["before"] >= 2
    assert cuts["after_short_cut"] is True
    assert cuts["errors"], cuts  # it was cut for longer than Ray Client waits
    assert cuts["after_long_cut"] is True
    assert cuts["next_sequence"] == cuts["seen"] + 1
    assert cuts["exists"] is False
    assert not (tmp_path / "outside" / "cache" / "runs").exists()


def test_a_cluster_a_token_that_it_refuses_and_a_port_where_nothing_is_are_told_apart(
    cluster: CoveredCluster, variables: dict[str, str], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, cluster.environment[name])
    trusted = check_ray(settings)
    nowhere = check_ray(load({**variables, "GRAFT_ORCHESTRATOR_RAY_ADDRESS": f"ray://127.0.0.1:{free_port()}"}))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    stranger = check_ray(settings)
    assert trusted.state is State.OK, trusted
    assert "2 nodes, 2 CPUs" in trusted.message
    assert "token" in stranger.message
    assert "RAY_AUTH_TOKEN" in stranger.fix
    assert "token" not in nowhere.message
    assert "ray_address" in nowhere.fix
