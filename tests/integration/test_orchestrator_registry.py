"""The orchestrator on a real MLflow server: a job's version, its champion, and aliases moved by MLflow's own client."""

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import pytest

from graft.domain.jobs import JobState
from graft.registry.mlflow_registry import Registry
from tests.support.mlflow_server import mlflow_server
from tests.support.orchestration import BASE, CHAMPION, KEY, PROJECT, world
from tests.support.tracked import curve

pytestmark = pytest.mark.integration

PATIENCE_SECONDS = 60.0
"""Other tests run beside this one: how soon an alias is honoured is measured where none does, in `tests/e2e`."""


async def test_a_job_registers_in_mlflow_and_a_foreign_alias_is_honoured(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    (tmp_path / "mlflow").mkdir()
    with mlflow_server(tmp_path / "mlflow") as uri:
        client = MlflowClient(uri, uri)
        name = f"{PROJECT}--{BASE}--reviews"
        async with world(tmp_path, GRAFT_ORCHESTRATOR_LEASE_SECONDS="60") as it:
            it.parts = replace(it.parts, registry=Registry(uri, tmp_path / "cache"))
            await it.create_job("job-1")
            async with it.orchestrator():
                job = await it.until("job-1", JobState.SUCCEEDED, PATIENCE_SECONDS)
                assert job.fine_tuned_model == f"{BASE}:reviews@1"
                assert client.get_model_version_by_alias(name, CHAMPION).version == "1"
                assert job.mlflow_run_id is not None
                run = client.get_run(job.mlflow_run_id)
                assert run.data.params["lora.rank"] == "8"
                assert run.data.tags["graft.base_model_digest"] == "sha256:base"
                losses = await asyncio.to_thread(curve, client, job.mlflow_run_id, "loss")
                assert losses == [(1, 2.0), (2, 1.0), (3, 0.0)]

                client.set_registered_model_alias(name, "candidate", "1")
                deadline = time.monotonic() + PATIENCE_SECONDS
                while (await it.store.get_adapter(*KEY)).aliases.get("candidate") != 1:
                    assert time.monotonic() < deadline
                    await asyncio.sleep(0.02)
