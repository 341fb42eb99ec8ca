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

pytestmark = pytest.mark.integration


async def test_a_job_registers_in_mlflow_and_a_foreign_alias_is_honoured_within_five_seconds(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    (tmp_path / "mlflow").mkdir()
    with mlflow_server(tmp_path / "mlflow") as uri:
        client = MlflowClient(uri, uri)
        name = f"{PROJECT}--{BASE}--reviews"
        async with world(tmp_path) as it:
            it.parts = replace(it.parts, registry=Registry(uri, tmp_path / "cache"))
            await it.create_job("job-1")
            async with it.orchestrator():
                job = await it.until("job-1", JobState.SUCCEEDED)
                assert job.fine_tuned_model == f"{BASE}:reviews@1"
                assert client.get_model_version_by_alias(name, CHAMPION).version == "1"
                assert job.mlflow_run_id is not None
                run = client.get_run(job.mlflow_run_id)
                assert run.data.params["lora.rank"] == "8"
                assert run.data.tags["graft.base_model_digest"] == "sha256:base"
                losses = client.get_metric_history(job.mlflow_run_id, "loss")
                assert [(point.step, point.value) for point in losses] == [(1, 2.0), (2, 1.0), (3, 0.0)]

                client.set_registered_model_alias(name, "candidate", "1")
                moved = time.monotonic()
                while (await it.store.get_adapter(*KEY)).aliases.get("candidate") != 1:
                    assert time.monotonic() - moved < 5
                    await asyncio.sleep(0.02)
            assert client.get_run(job.mlflow_run_id).info.status == "FINISHED"
