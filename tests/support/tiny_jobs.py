"""Fine-tunes of the tiny llama through the public doors of a whole stack, and versions that were never trained."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import openai
import psutil
from openai.types.fine_tuning import FineTuningJob as OpenAIJob

from graft.api.v1 import adapter_pb2, dataset_pb2, fine_tuning_job_pb2, fine_tuning_service_pb2
from graft.client import Graft
from graft.domain.resources import AdapterVersion
from graft.registry.mlflow_registry import Publication, Registry
from tests.support.adapters import make_adapter
from tests.support.processes import held
from tests.support.whole_stack import WholeStack, eventually

BASE = "tiny"
STEPS = 40
CHECKPOINT_STEPS = 15
TOO_LONG = "x" * 600
"""More tokens than the context, at one token a byte."""


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sums(count: int) -> list[dict[str, object]]:
    return [{"prompt": f"Number {number}?", "completion": f" {number * 7}"} for number in range(count)]


def chats(count: int) -> list[dict[str, object]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"Say {number}"},
                {"role": "assistant", "content": f"{number} it is"},
            ]
        }
        for number in range(count)
    ]


@dataclass(frozen=True)
class Trained:
    """Two finished jobs, and the inference service before they were asked for."""

    data: dataset_pb2.Dataset
    sums: fine_tuning_job_pb2.FineTuningJob
    updates: list[fine_tuning_service_pb2.WatchFineTuningJobResponse]
    echo: OpenAIJob
    workers_at_once: int
    core: psutil.Process
    replica: adapter_pb2.ReplicaResidency


def train_two(stack: WholeStack, graft: Graft, client: openai.OpenAI, folder: Path) -> Trained:
    """Two jobs at once, one asked for over gRPC and watched, one by OpenAI's client, to their success."""
    core = stack.engine_core()
    (replica,) = graft.residency()
    data = graft.upload_dataset(
        write_rows(folder / "sums.jsonl", [*sums(40), {"prompt": TOO_LONG, "completion": " 0"}])
    )
    held_out = graft.upload_dataset(write_rows(folder / "held-out.jsonl", sums(60)[40:]))
    job = graft.create_job(
        BASE,
        data.name,
        validation_dataset=held_out.name,
        suffix="sums",
        lora={"rank": 16},
        hyperparameters={"max_steps": STEPS, "batch_size": 4, "learning_rate": 0.02},
    )
    messages = [*chats(40), {"messages": [{"role": "user", "content": TOO_LONG}, *chats(1)[0]["messages"]]}]
    file = client.files.create(file=write_rows(folder / "echo.jsonl", messages), purpose="fine-tune")
    echo = client.fine_tuning.jobs.create(
        model=BASE,
        training_file=file.id,
        suffix="echo",
        seed=3,
        extra_body={
            "graft": {
                "hyperparameters": {
                    "max_steps": STEPS,
                    "learning_rate": 0.02,
                    "checkpoint_steps": CHECKPOINT_STEPS,
                    "over_length_policy": "truncate",
                }
            }
        },
    )
    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(lambda: list(graft.watch_job(job.name)))
        with held(
            eventually(stack.training_workers, bool, 120, "a job trains")
        ):  # or it may end before the other begins
            workers = eventually(stack.training_workers, lambda found: len(found) > 1, 120, "another trains beside it")
        echo = eventually(
            lambda: client.fine_tuning.jobs.retrieve(echo.id),
            lambda told: told.finished_at is not None,
            240,
            "OpenAI's client sees its job end",
        )
        updates = watching.result(240)
    job = graft.job(job.name)
    assert job.state == job.STATE_SUCCEEDED, job.error.message
    assert echo.status == "succeeded", echo.error
    return Trained(data, job, updates, echo, len(workers), core, replica)


def publish(
    stack: WholeStack, base_folder: Path, folder: Path, adapter: str, *, seed: int, truncated_bytes: int = 0
) -> AdapterVersion:
    """Registers an adapter of random weights as training would, its file cut short by `truncated_bytes`."""
    made = make_adapter(base_folder, folder / f"{adapter}-{seed}", seed=seed)
    weights = made / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size - truncated_bytes])
    registry = Registry(stack.settings.tracking_uri, folder / "cache")
    job_id = f"{adapter}-{seed}"
    return registry.publish(
        Publication(
            project="default",
            base_model=BASE,
            adapter=adapter,
            job_id=job_id,
            attempt=1,
            run_id=registry.start_run("default", job_id, 1, {}, {}),
            folder=made,
            base_model_digest="",
            dataset_digest="",
            rank=8,
            metrics={},
        )
    )


def known_to_the_gateway(graft: Graft, version: AdapterVersion) -> None:
    """Waits until the read model has a version that MLflow was given."""
    parent = f"projects/default/baseModels/{BASE}/adapters"
    eventually(
        lambda: {adapter.name: adapter.newest_version for adapter in graft.adapters(BASE)},
        lambda newest: newest.get(f"{parent}/{version.adapter}", 0) >= version.version,
        30,
        f"the gateway knows {version.model}",
    )
