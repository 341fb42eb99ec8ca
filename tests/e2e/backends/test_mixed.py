"""A stack whose store and MLflow are on PostgreSQL and whose files are in a bucket, started by `graft up --config`."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import s3fs
from sqlalchemy import create_engine, make_url, text

from graft.client import Graft
from tests.support.method_jobs import letters
from tests.support.postgres import postgres_server
from tests.support.s3_server import S3Server, s3_server
from tests.support.tiny_jobs import BASE, write_rows
from tests.support.tiny_llama import make_tiny_llama
from tests.support.whole_stack import WholeStack, eventually, make_stack, removed

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(580)]

CONFIG = """
store: {{url: "{store}"}}
storage: {{url: "s3://graft/main", endpoint_url: "{endpoint}"}}
registry: {{backend_store_uri: "{mlflow}", artifacts_destination: "s3://graft/mlflow"}}
"""
PROMPTS: list[dict[str, Any]] = [{"prompt": f"Number {number}?", "wanted": "e"} for number in range(16)]


@dataclass(frozen=True)
class Mixed:
    stack: WholeStack
    graft: Graft
    s3: S3Server

    def objects(self, folder: str) -> list[str]:
        """Names of what the bucket holds below a folder."""
        root = self.s3.folder / "graft" / folder
        return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mixed]:
    folder = tmp_path_factory.mktemp("mixed")
    base = make_tiny_llama(folder / "base")
    with postgres_server() as server, s3_server() as s3, pytest.MonkeyPatch.context() as patch:
        for name, value in s3.variables.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        engine = create_engine(server, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            for name in ("graft", "mlflow"):
                connection.execute(text(f"CREATE DATABASE {name}"))
        engine.dispose()
        urls = {name: make_url(server).set(database=name).render_as_string(False) for name in ("graft", "mlflow")}
        config = folder / "cluster.yaml"
        config.write_text(CONFIG.format(store=urls["graft"], mlflow=urls["mlflow"], endpoint=s3.endpoint_url))
        made = make_stack(
            {BASE: {"folder": str(base), "license": "Apache-2.0"}},
            GRAFT_SERVING_BASE_MODEL=BASE,
            GRAFT_SERVING_DTYPE="float32",
        )
        with removed(made) as stack:
            doctor = stack.graft("doctor", "--json", "--config", str(config))
            checks = {check["name"]: check for check in json.loads(doctor.stdout)["checks"]}
            assert checks["storage"]["state"] == "ok", checks["storage"]
            assert "no schema yet" in checks["database"]["message"]
            stack.start("--config", str(config))
            with stack.client() as client:
                yield Mixed(stack, client, s3)
            stack.interrupt()


def _succeeded(mixed: Mixed, name: str) -> Any:
    job = eventually(lambda: mixed.graft.job(name), lambda now: now.HasField("end_time"), 240, "the job ends")
    assert job.state == job.STATE_SUCCEEDED, job.error.message
    return job


def test_a_job_and_its_evaluation_leave_nothing_in_the_home_that_others_need(mixed: Mixed, tmp_path: Path) -> None:
    graft = mixed.graft
    data = graft.upload_dataset(write_rows(tmp_path / "rows.jsonl", letters(40)))
    made = graft.create_job(
        BASE, data.name, suffix="letters", hyperparameters={"max_steps": 12, "batch_size": 8, "checkpoint_steps": 5}
    )
    job = _succeeded(mixed, made.name)
    identity = made.name.rpartition("/")[2]
    assert len(mixed.objects("main/datasets/default")) == 1
    assert "config.json" in {name.rpartition("/")[2] for name in mixed.objects("main/base_models")}
    there = mixed.objects(f"main/runs/{identity}/1")
    assert {"adapter/adapter_model.safetensors", "checkpoints/step-5/adapter_model.safetensors"} <= set(there)
    assert any(name.endswith("adapter_model.safetensors") for name in mixed.objects("mlflow"))
    evaluation = graft.create_evaluation(data.name, [BASE, job.fine_tuned_model])
    done = eventually(
        lambda: graft.evaluation(evaluation.name), lambda now: now.HasField("end_time"), 120, "the evaluation ends"
    )
    assert done.state == done.STATE_SUCCEEDED, done.error.message
    reports = [name for name in mixed.objects("main/evaluations/default") if name.endswith("report.html")]
    assert len(reports) == 1
    report = graft.evaluation_report(evaluation.name)
    assert "letters" in (report.decode() if isinstance(report, bytes) else str(report))
    assert not list((mixed.stack.home / "datasets").rglob("*.jsonl"))
    assert not (mixed.stack.home / "graft.db").exists()
    assert not (mixed.stack.home / "mlflow" / "mlflow.db").exists()


def test_the_policies_of_reinforcement_go_to_the_engine_by_the_bucket(mixed: Mixed, tmp_path: Path) -> None:
    graft = mixed.graft
    data = graft.upload_dataset(write_rows(tmp_path / "prompts.jsonl", PROMPTS))
    made = graft.create_job(
        BASE,
        data.name,
        suffix="policy",
        method="reinforcement",
        method_options={
            "grader": {"kind": "regex", "settings": {"pattern": "(e)", "field": "wanted"}},
            "group_size": 4,
            "max_completion_tokens": 8,
        },
        hyperparameters={"max_steps": 3, "batch_size": 4, "learning_rate": 0.02},
    )
    _succeeded(mixed, made.name)
    assert list((mixed.stack.home / "cache" / "policies").glob("*/*/adapter_model.safetensors"))
    assert mixed.objects(f"main/runs/{made.name.rpartition('/')[2]}/1/policy") == []
