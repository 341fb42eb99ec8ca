"""A fine-tune over gRPC, from the upload to the registered version, and that version outside of Graft."""

import json
from pathlib import Path
from typing import Any

import grpc
import mlflow
import openai
import pytest
import torch
from mlflow import MlflowClient
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from graft.api.v1 import fine_tuning_service_pb2, fine_tuning_service_pb2_grpc
from graft.api.v1.fine_tuning_job_pb2 import FineTuningJob
from graft.client import Graft
from graft.registry.digest import adapter_digest
from tests.support.tiny_jobs import BASE, STEPS, Trained
from tests.support.tracked import curve, finished_run
from tests.support.whole_stack import WholeStack

pytestmark = pytest.mark.e2e

REGISTERED = "default--tiny--sums"


def events(trained: Trained, kind: str) -> list[Any]:
    return [update.event for update in trained.updates if update.event.type == kind]


def test_a_watched_job_tells_its_states_and_its_progress_and_ends_in_success(trained: Trained) -> None:
    job = trained.sums
    assert job.state == FineTuningJob.STATE_SUCCEEDED, job.error
    assert (job.attempt, job.fine_tuned_model) == (1, "tiny:sums@1")
    assert [update.event.sequence for update in trained.updates] == list(range(1, len(trained.updates) + 1))
    assert [event.data["state"] for event in events(trained, "state")] == [
        "VALIDATING", "QUEUED", "STARTING", "RUNNING", "REGISTERING", "EVALUATING", "SUCCEEDED"
    ]  # fmt: skip
    assert trained.updates[-1].fine_tuning_job == job
    steps = [event.data["step"] for event in events(trained, "metrics")]
    assert steps == sorted(set(steps))
    assert steps[-1] == STEPS
    losses = [event.data["loss"] for event in events(trained, "metrics")]
    assert losses[-1] < losses[0]
    assert (job.progress.step, job.progress.total_steps) == (STEPS, STEPS)
    assert job.metrics["validation_loss"] > 0
    assert job.metrics["parity_max_abs_difference"] < 0.05


def test_a_watch_resumes_after_the_sequence_that_it_is_given(stack: WholeStack, trained: Trained) -> None:
    last = len(trained.updates)
    with grpc.insecure_channel(f"127.0.0.1:{stack.settings.gateway.grpc_port}") as channel:
        stub = fine_tuning_service_pb2_grpc.FineTuningServiceStub(channel)
        request = fine_tuning_service_pb2.WatchFineTuningJobRequest(name=trained.sums.name, after_sequence=last - 2)
        assert [update.event.sequence for update in stub.WatchFineTuningJob(request)] == [last - 1, last]


@pytest.mark.parametrize(("job", "policy", "examples"), [("sums", "drop", 40), ("echo", "truncate", 41)])
def test_an_example_longer_than_the_context_is_counted_and_told(
    graft: Graft, trained: Trained, job: str, policy: str, examples: int
) -> None:
    name = trained.sums.name if job == "sums" else trained.echo.id
    (told,) = [
        update.event for update in graft.watch_job(name) if dict(update.event.data).get("key") == "data-training"
    ]
    assert f"1 are longer than the context; policy: {policy}." in told.message
    assert (told.data["row_count"], told.data["example_count"], told.data["over_length_count"]) == (41, examples, 1)


def test_an_example_longer_than_the_context_fails_a_job_that_asks_for_it(graft: Graft, trained: Trained) -> None:
    policy = "OVER_LENGTH_POLICY_FAIL"
    job = graft.create_job(BASE, trained.data.name, hyperparameters={"over_length_policy": policy})
    *_, last = graft.watch_job(job.name)
    assert last.fine_tuning_job.state == FineTuningJob.STATE_FAILED
    assert "1 of 41 rows are longer than 512 tokens" in last.fine_tuning_job.error.message


def test_the_version_carries_its_lineage(graft: Graft, trained: Trained) -> None:
    (version,) = graft.adapter_versions("tiny:sums")
    (base,) = graft.base_models()
    assert version.model == "tiny:sums@1"
    assert version.fine_tuning_job == trained.sums.name
    assert version.dataset_digest == trained.data.digest
    assert version.base_model_digest == base.digest
    assert version.rank == 16
    assert list(version.aliases) == ["champion"]
    assert version.metrics["train_loss"] == pytest.approx(trained.sums.metrics["train_loss"])
    (adapter,) = [adapter for adapter in graft.adapters(BASE) if adapter.model == "tiny:sums"]
    assert dict(adapter.aliases) == {"champion": 1}


def test_mlflow_shows_the_version_its_alias_its_tags_and_its_run(
    stack: WholeStack, graft: Graft, trained: Trained
) -> None:
    registry = MlflowClient(tracking_uri=stack.settings.tracking_uri, registry_uri=stack.settings.tracking_uri)
    (told,) = graft.adapter_versions("tiny:sums")
    assert registry.get_registered_model(REGISTERED).aliases == {"champion": "1"}
    version = registry.get_model_version(REGISTERED, "1")
    assert version.tags["graft.job"] == trained.sums.name.rsplit("/", 1)[-1]
    assert version.tags["graft.digest"] == told.digest
    assert version.tags["graft.base_model_digest"] == told.base_model_digest
    assert version.tags["graft.dataset_digest"] == told.dataset_digest
    assert version.tags["graft.rank"] == "16"
    run = finished_run(registry, told.mlflow_run_id)
    assert version.run_id == run.info.run_id
    assert run.data.params["base_model"] == BASE
    assert run.data.params["learning_rate"] == "0.02"
    assert run.data.tags["graft.adapter"] == "sums"
    losses = curve(registry, run.info.run_id, "loss")
    assert [step for step, _ in losses] == list(range(1, STEPS + 1))


@pytest.mark.usefixtures("trained")
def test_plain_mlflow_and_peft_load_the_version_and_compute_what_the_service_does(
    stack: WholeStack, client: openai.OpenAI, base_folder: Path, tmp_path: Path
) -> None:
    mlflow.set_tracking_uri(stack.settings.tracking_uri)
    downloaded = Path(mlflow.artifacts.download_artifacts(f"models:/{REGISTERED}@champion", dst_path=str(tmp_path)))
    assert {path.suffix for path in downloaded.iterdir()} == {".json", ".safetensors"}
    version = MlflowClient(stack.settings.tracking_uri).get_model_version(REGISTERED, "1")
    assert adapter_digest(downloaded) == version.tags["graft.digest"]
    assert json.loads((downloaded / "adapter_config.json").read_text())["r"] == 16

    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), downloaded).eval()
    prompt = "Number 5?"
    inputs = torch.tensor([tokenizer(prompt)["input_ids"]])
    with torch.no_grad():
        made = model.generate(
            inputs, max_new_tokens=8, do_sample=False, output_scores=True, return_dict_in_generate=True
        )
    tokens = made.sequences[0, inputs.shape[1] :]
    scores = torch.log_softmax(torch.stack(made.scores)[:, 0], dim=-1)[range(len(tokens)), tokens]

    answer = client.completions.create(model="tiny:sums", prompt=prompt, max_tokens=8, temperature=0, logprobs=0)
    (choice,) = answer.choices
    assert choice.text == tokenizer.decode(tokens, skip_special_tokens=True)
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs == pytest.approx(scores.tolist(), abs=1e-3)
