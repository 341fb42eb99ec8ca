"""The real base model, a little of the real data, and the whole way from the one to the other."""

import json
import math

import pytest
from mlflow import MlflowClient

from graft.api.v1.fine_tuning_job_pb2 import FineTuningJob
from graft.data.samples import reviews, write_rows, zero_shot
from graft.orchestrator.evaluating import HALF_PARITY_NATS
from tests.support.serving_stack import titles
from tests.support.tracked import curve
from tests.support.whole_stack import WholeStack

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

BASE = "smollm2-135m"
STEPS = 8


def test_real_reviews_make_a_real_model_a_specialist_that_answers_and_is_in_mlflow(
    stack: WholeStack, tmp_path_factory: pytest.TempPathFactory
) -> None:
    sample = reviews(64, 8)
    with stack.client() as graft:
        data = graft.upload_dataset(write_rows(sample.train, tmp_path_factory.mktemp("rows") / "reviews.jsonl"))
        assert data.row_count == 64
        job = graft.create_job(BASE, data.name, suffix="reviews", hyperparameters={"max_steps": STEPS})
        *_, last = graft.watch_job(job.name)
        job = last.fine_tuning_job
        (base,) = graft.base_models()
    assert job.state == FineTuningJob.STATE_SUCCEEDED, job.error
    assert job.fine_tuned_model == f"{BASE}:reviews@1"
    assert 0 <= job.metrics["parity_max_abs_difference"] < HALF_PARITY_NATS

    with stack.openai() as client:
        told = client.chat.completions.create(
            model=job.fine_tuned_model, messages=zero_shot(sample.heldout[0]), max_tokens=4, temperature=0
        )
    assert told.model == job.fine_tuned_model
    assert told.choices[0].message.content in sample.labels

    registry = MlflowClient(tracking_uri=stack.settings.tracking_uri, registry_uri=stack.settings.tracking_uri)
    version = registry.get_model_version_by_alias(f"default--{BASE}--reviews", "champion")
    assert version.tags["graft.base_model_digest"] == base.digest
    assert version.tags["graft.dataset_digest"] == data.digest
    losses = [value for _, value in curve(registry, version.run_id, "loss")]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]
    assert math.isfinite(losses[-1])


def test_down_ends_a_stack_in_the_background_and_leaves_no_process(stack: WholeStack) -> None:
    told = json.loads(stack.graft("status", "--json").stdout)
    assert told["ready"]
    assert len(stack.left()) > 10
    ended = stack.graft("down")
    assert (ended.returncode, ended.stdout.strip()) == (0, "Stopped.")
    assert titles(stack.left()) == []
    gone = stack.graft("status", "--json")
    assert (gone.returncode, json.loads(gone.stdout)) == (4, {"ready": False, "processes": []})
