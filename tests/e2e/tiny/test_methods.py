"""Every method and every choice of what changes, through the public doors, until the result answers."""

import json
import re
from typing import Any

import openai
import pytest
from google.protobuf.json_format import MessageToDict
from mlflow import MlflowClient
from safetensors.torch import load_file
from transformers import AutoTokenizer

from graft.api.v1 import fine_tuning_job_pb2
from graft.client import Graft
from graft.domain.errors import FailedPrecondition, InvalidArgument
from tests.support import tracked
from tests.support.method_jobs import PATIENCE, STOPPED_STEPS, Jobs
from tests.support.tiny_jobs import BASE
from tests.support.whole_stack import WholeStack

# The first test waits for all jobs of `jobs`: two minutes on two cores.
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

ADAPTERS = ("texts", "all", "turns", "pairs", "last", "full", "onward", "stopped")
DELTAS = ("all", "turns", "last", "full")
PARITY_NATS = 0.05


def curve(stack: WholeStack, graft: Graft, jobs: Jobs, suffix: str, name: str = "loss") -> list[float]:
    """A metric of every step, as MLflow has it."""
    run = graft.adapter_version(jobs.model(suffix)).mlflow_run_id
    return [value for _, value in tracked.curve(MlflowClient(stack.settings.tracking_uri), run, name)]


def told(graft: Graft, job: fine_tuning_job_pb2.FineTuningJob, kind: str) -> list[dict[str, Any]]:
    return [MessageToDict(event.data) for event in graft.job_events(job.name) if event.type == kind]


@pytest.mark.parametrize("suffix", ADAPTERS)
def test_each_learns_is_proven_in_the_engine_and_answers(
    suffix: str, stack: WholeStack, graft: Graft, client: openai.OpenAI, jobs: Jobs
) -> None:
    job = jobs.by_suffix[suffix]
    losses = curve(stack, graft, jobs, suffix)
    assert min(losses[1:]) < 0.97 * losses[0]
    assert job.metrics["parity_max_abs_difference"] <= PARITY_NATS
    assert graft.generate(job.fine_tuned_model, prompt="1 a?", max_tokens=8).model == job.fine_tuned_model
    answer = client.chat.completions.create(
        model=job.fine_tuned_model, messages=[{"role": "user", "content": "1 a?"}], max_tokens=8
    )
    assert answer.model == job.fine_tuned_model
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0


@pytest.mark.parametrize("suffix", DELTAS)
def test_what_the_engine_cannot_load_is_served_as_a_delta_whose_cost_is_told(
    suffix: str, graft: Graft, jobs: Jobs
) -> None:
    job = jobs.by_suffix[suffix]
    assert job.served_as == fine_tuning_job_pb2.SERVED_AS_LOW_RANK_DELTA
    assert 0 < job.metrics["delta_retained_fraction"] <= 1
    assert "delta_loss_change" in job.metrics
    assert any("of the weights' squared change" in event.message for event in graft.job_events(job.name))


def test_a_job_says_how_it_learns_as_it_was_asked(jobs: Jobs) -> None:
    methods = {suffix: job.WhichOneof("method") for suffix, job in jobs.by_suffix.items()}
    assert methods == {
        **dict.fromkeys(("all", "last", "full", "stopped"), "supervised"),
        **dict.fromkeys(("turns", "weights"), "instruction"),
        **dict.fromkeys(("texts", "onward"), "self_supervised"),
        "pairs": "preference",
    }
    assert jobs.by_suffix["all"].supervised.loss_on == fine_tuning_job_pb2.LOSS_ON_ALL
    assert jobs.by_suffix["texts"].lora.use_rslora
    assert jobs.by_suffix["turns"].lora.modules_to_save == ["lm_head"]
    assert jobs.by_suffix["last"].last_layers.train_head


def test_a_trained_head_is_its_own_and_no_longer_the_embeddings(stack: WholeStack, jobs: Jobs) -> None:
    job_id = jobs.by_suffix["last"].name.rsplit("/", 1)[-1]
    folder = stack.home / "runs" / job_id / "1" / "model"
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    weights = load_file(folder / "model.safetensors")
    embeddings, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    assert embeddings.shape == head.shape
    assert not embeddings.equal(head)


def test_raw_text_tells_the_perplexity_of_what_is_held_out(stack: WholeStack, graft: Graft, jobs: Jobs) -> None:
    perplexities = curve(stack, graft, jobs, "texts", "validation_perplexity")
    assert perplexities[-1] < perplexities[0]
    assert jobs.by_suffix["texts"].metrics["validation_perplexity"] == pytest.approx(perplexities[-1])


def test_preferences_tell_accuracy_and_margin_in_events_and_in_mlflow(
    stack: WholeStack, graft: Graft, jobs: Jobs
) -> None:
    events = told(graft, jobs.by_suffix["pairs"], "metrics")
    assert {"accuracy", "margin", "chosen_reward", "rejected_reward"} <= set(events[-1])
    margins = curve(stack, graft, jobs, "pairs", "margin")
    assert margins[0] == pytest.approx(0, abs=1e-5)  # the first step's model is its reference
    assert margins[-1] > 0
    assert curve(stack, graft, jobs, "pairs", "accuracy")[-1] == 1.0
    assert jobs.by_suffix["pairs"].metrics["validation_accuracy"] == 1.0


def test_turns_of_weight_zero_are_not_learned(stack: WholeStack, jobs: Jobs) -> None:
    job_id = jobs.by_suffix["weights"].name.rsplit("/", 1)[-1]
    about = json.loads((stack.home / "runs" / job_id / "1" / "model" / "graft.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(stack.home / "runs" / job_id / "1" / "model")
    learned = [tokenizer.decode(probe["completion_token_ids"]) for probe in about["probes"]]
    assert learned
    assert all(re.fullmatch(r"\d+ it is<\|im_end\|>\s*", text) for text in learned), learned


def test_a_merged_model_is_told_to_be_deployed_and_not_answered_by_the_shared_engine(graft: Graft, jobs: Jobs) -> None:
    job = jobs.by_suffix["weights"]
    assert job.served_as == fine_tuning_job_pb2.SERVED_AS_MERGED_MODEL
    hint = f"graft models deploy {job.fine_tuned_model}"
    assert any(hint in event.message for event in graft.job_events(job.name))
    with pytest.raises(FailedPrecondition, match=re.escape(hint)):
        graft.generate(job.fine_tuned_model, prompt="1 a?", max_tokens=8)


def test_training_goes_on_where_the_version_ended(stack: WholeStack, graft: Graft, jobs: Jobs) -> None:
    before, after = curve(stack, graft, jobs, "texts"), curve(stack, graft, jobs, "onward")
    # Every step has all rows, so that nothing but the weights tells one loss from another.
    learned = before[0] - before[-1]
    assert abs(after[0] - before[-1]) < 0.2 * learned
    job = jobs.by_suffix["onward"]
    assert job.from_adapter == jobs.model("texts")
    ranks = [one.value.number_value for one in job.resolved_hyperparameters if one.name == "lora.rank"]
    assert ranks == [4]  # the version's own


def test_training_stops_when_held_out_loss_no_longer_falls_and_the_best_weights_are_served(
    stack: WholeStack, graft: Graft, jobs: Jobs
) -> None:
    job = jobs.by_suffix["stopped"]
    losses = curve(stack, graft, jobs, "stopped", "validation_loss")[: int(job.metrics["best_step"]) + PATIENCE]
    best = min(range(len(losses)), key=lambda place: losses[place])
    assert job.metrics["best_step"] == best + 1
    assert job.metrics["validation_loss"] == pytest.approx(losses[best])
    assert job.progress.step == best + 1 + PATIENCE < STOPPED_STEPS
    assert any(event.message.startswith("Stopped early at step") for event in graft.job_events(job.name))


def test_a_quantized_base_is_refused_with_its_reason_by_both_doors(
    graft: Graft, client: openai.OpenAI, jobs: Jobs
) -> None:
    with pytest.raises(InvalidArgument, match="needs a GPU and bitsandbytes") as caught:
        graft.create_job(BASE, jobs.data["all"], lora={"base_quantization": "BASE_QUANTIZATION_NF4"})
    assert [one.field for one in caught.value.violations] == ["lora.base_quantization"]
    with pytest.raises(openai.BadRequestError, match="needs a GPU and bitsandbytes") as refused:
        client.fine_tuning.jobs.create(
            model=BASE,
            training_file=jobs.data["all"],
            extra_body={"graft": {"lora": {"base_quantization": "nf4"}}},
        )
    assert refused.value.param == "graft.lora.base_quantization"
