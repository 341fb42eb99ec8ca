"""Fine-tuning jobs through the unmodified `openai` client: created, followed and cancelled."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint

from graft.domain.errors import InvalidArgument
from graft.domain.jobs import Checkpoint, EventLevel, JobError, JobState, OverLengthPolicy, Progress, Resolved, Sharding
from graft.gateway.http.convert import STATUSES
from graft.gateway.http.job_spec import job_spec
from tests.support.gateways import BASE, NOW
from tests.support.http_gateways import HttpGateway, http_gateway
from tests.unit.test_http_files import uploaded

LEASE = timedelta(seconds=60)


async def created(it: HttpGateway, **fields: Any) -> FineTuningJob:
    if "training_file" not in fields:
        fields["training_file"] = (await uploaded(it)).id
    return await it.client.fine_tuning.jobs.create(**{"model": BASE} | fields)


async def test_a_file_becomes_a_job_that_is_followed_to_its_model(tmp_path: Path) -> None:
    async with http_gateway(tmp_path) as it:
        jobs = it.client.fine_tuning.jobs
        made = await created(it, suffix="reviews", seed=7, metadata={"owner": "me"})
        assert FineTuningJob.model_validate(made.to_dict()) == made
        assert (made.status, made.fine_tuned_model, made.finished_at) == ("validating_files", None, None)
        assert (made.seed, made.metadata, made.model) == (7, {"owner": "me"}, BASE)
        assert made.method is not None
        assert made.method.type == "supervised"
        assert made.hyperparameters.n_epochs == "auto"
        needed = made.to_dict()["graft"]["memory_estimate"]
        assert needed["total_bytes"] == sum(size for name, size in needed.items() if name != "total_bytes")

        (job,) = await it.store.claim_jobs("test", LEASE, 1)
        for state in (JobState.QUEUED, JobState.STARTING, JobState.RUNNING):
            job = await it.store.transition(job, "test", state, message=f"now {state}")
        resolved = [Resolved("epochs", 2.0, True, "small data"), Resolved("batch_size", 8, True, "fits")]
        progress = Progress(step=3, total_steps=10, loss=0.5, trained_tokens=900, remaining_seconds=60.0)
        metrics: dict[str, object] = {"step": 3, "train_loss": 0.5}
        job = await it.store.record(job, "test", resolved=resolved, progress=progress)
        job = await it.store.record(job, "test", event=(EventLevel.INFO, "metrics", "step 3", metrics))
        running = await jobs.retrieve(made.id)
        assert (running.status, running.trained_tokens) == ("running", None)
        assert (running.hyperparameters.n_epochs, running.hyperparameters.batch_size) == (2, 8)
        assert running.estimated_finish is not None
        assert running.to_dict()["graft"]["progress"]["step"] == 3

        job = await it.store.transition(job, "test", JobState.REGISTERING, message="registering")
        job = await it.store.transition(job, "test", JobState.EVALUATING, message="evaluating")
        model = f"{BASE}:reviews@3"
        await it.store.transition(job, "test", JobState.SUCCEEDED, message="done", fine_tuned_model=model)
        ended = await jobs.retrieve(made.id)
        assert (ended.status, ended.fine_tuned_model, ended.trained_tokens) == ("succeeded", model, 900)
        assert ended.finished_at is not None
        said: Any = [{"role": "user", "content": "hello"}]
        answer = await it.client.chat.completions.create(model=str(ended.fine_tuned_model), messages=said)
        assert answer.choices[0].message.content == f"[{model}] hello"

        events = [event async for event in jobs.list_events(made.id, limit=3)]
        assert [FineTuningJobEvent.model_validate(event.to_dict()) for event in events] == events
        assert events[0].message == "done"
        assert len({event.id for event in events}) == len(events) == 8
        assert [event.data for event in events if event.type == "metrics"] == [metrics]


async def test_events_come_newest_first_and_after_leads_to_older_ones(tmp_path: Path) -> None:
    async with http_gateway(tmp_path) as it:
        made = await created(it)
        jobs = it.client.fine_tuning.jobs
        (only,) = (await jobs.list_events(made.id)).data
        (job,) = await it.store.claim_jobs("test", LEASE, 1)
        for count in range(1, 12):
            job = await it.store.record(job, "test", event=(EventLevel.WARN, "message", f"m{count}", {}))
            newest = await jobs.list_events(made.id, limit=2)
            assert [event.message for event in newest.data] == [
                f"m{count}",
                f"m{count - 1}" if count > 1 else only.message,
            ]
            assert newest.has_more is (count > 1)
        everything = [event.message async for event in jobs.list_events(made.id, limit=5)]
        assert everything == [*(f"m{count}" for count in range(11, 0, -1)), only.message]
        for after in ("nothing", "ftevent-other-3", only.id + "x", f"ftevent-{made.id}-13"):
            with pytest.raises(openai.BadRequestError):
                await jobs.list_events(made.id, after=after)


async def test_checkpoints_come_newest_first_with_openais_metric_names(tmp_path: Path) -> None:
    async with http_gateway(tmp_path) as it:
        made = await created(it)
        checkpoints = it.client.fine_tuning.jobs.checkpoints
        assert [one async for one in checkpoints.list(made.id)] == []
        (job,) = await it.store.claim_jobs("test", LEASE, 1)
        for step in (10, 20, 30):
            losses = {"train_loss": 0.5, "validation_loss": 0.6}
            await it.store.record(job, "test", checkpoint=Checkpoint(step, NOW, f"file:///c{step}", 1, losses))
        found = [one async for one in checkpoints.list(made.id, limit=2)]
        assert [FineTuningJobCheckpoint.model_validate(one.to_dict()) for one in found] == found
        assert [one.step_number for one in found] == [30, 20, 10]
        assert (found[0].metrics.train_loss, found[0].metrics.valid_loss, found[0].metrics.step) == (0.5, 0.6, 30)
        assert found[0].fine_tuning_job_id == made.id


async def test_a_cancel_is_a_wish_and_a_second_one_changes_nothing(tmp_path: Path) -> None:
    async with http_gateway(tmp_path) as it:
        jobs = it.client.fine_tuning.jobs
        made = await created(it)
        for _ in range(2):
            asked = await jobs.cancel(made.id)
            assert asked.to_dict()["graft"]["cancel_requested"] is True
        (job,) = await it.store.claim_jobs("test", LEASE, 1)
        await it.store.transition(job, "test", JobState.CANCELLED, message="cancelled")
        assert (await jobs.retrieve(made.id)).status == "cancelled"
        assert (await jobs.cancel(made.id)).status == "cancelled"


async def test_a_failed_job_says_why_and_cannot_be_cancelled(tmp_path: Path) -> None:
    async with http_gateway(tmp_path) as it:
        made = await created(it)
        (job,) = await it.store.claim_jobs("test", LEASE, 1)
        error = JobError("INTERNAL", "WORKER_LOST", "A worker ended.")
        await it.store.transition(job, "test", JobState.FAILED, message="failed", error=error)
        failed = await it.client.fine_tuning.jobs.retrieve(made.id)
        assert failed.status == "failed"
        assert failed.error is not None
        assert (failed.error.code, failed.error.message) == ("worker_lost", "A worker ended.")
        with pytest.raises(openai.ConflictError, match="already ended"):
            await it.client.fine_tuning.jobs.cancel(made.id)


async def test_jobs_are_paged_newest_first_and_a_retried_create_returns_the_first(tmp_path: Path) -> None:
    async with http_gateway(tmp_path) as it:
        data = (await uploaded(it)).id
        made = [(await created(it, training_file=data)).id for _ in range(4)]
        key = {"Idempotency-Key": "one"}
        retried = {(await created(it, training_file=data, extra_headers=key)).id for _ in range(2)}
        assert len(retried) == 1
        listed = [job.id async for job in it.client.fine_tuning.jobs.list(limit=2)]
        assert listed == [*retried, *made[::-1]]
        assert (await it.client.fine_tuning.jobs.list(after=made[1])).data[0].id == made[0]


async def test_both_places_for_hyperparameters_and_grafts_own_reach_the_job(tmp_path: Path) -> None:
    graft = {
        "lora": {"rank": 16, "alpha": 32, "dropout": 0.05, "target_modules": ["q_proj", "v_proj"]},
        "hyperparameters": {
            "learning_rate": 2e-4,
            "max_steps": 5,
            "over_length_policy": "truncate",
            "sharding": "never",
        },
    }
    method: Any = {
        "type": "supervised",
        "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": "auto", "learning_rate_multiplier": "auto"}},
    }
    async with http_gateway(tmp_path) as it:
        made = await created(it, method=method, extra_body={"graft": graft})
        assert made.hyperparameters.n_epochs == 3
        spec = (await it.store.get_job("default", made.id)).spec
        assert (spec.lora.rank, spec.lora.alpha, spec.lora.target_modules) == (16, 32.0, ("q_proj", "v_proj"))
        asked = spec.hyperparameters
        assert (asked.epochs, asked.batch_size, asked.learning_rate, asked.max_steps) == (3.0, None, 2e-4, 5)
        assert (asked.over_length_policy, asked.sharding) == (OverLengthPolicy.TRUNCATE, Sharding.NEVER)
        old = await created(it, hyperparameters={"n_epochs": "auto", "batch_size": 4, "learning_rate_multiplier": 1})
        assert (old.hyperparameters.batch_size, old.hyperparameters.n_epochs) == (4, "auto")
        assert old.hyperparameters.learning_rate_multiplier == 1


async def test_a_learning_rate_multiplier_reaches_the_job_and_is_told_as_sent(tmp_path: Path) -> None:
    async with http_gateway(tmp_path) as it:
        made = await created(it, hyperparameters={"learning_rate_multiplier": 0.5})
        assert made.hyperparameters.learning_rate_multiplier == 0.5
        asked = (await it.store.get_job("default", made.id)).spec.hyperparameters
        assert (asked.learning_rate, asked.learning_rate_multiplier) == (None, 0.5)
        open_ = await created(it)
        assert open_.hyperparameters.learning_rate_multiplier == "auto"


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        (
            {"hyperparameters": {"learning_rate_multiplier": 0}},
            "hyperparameters.learning_rate_multiplier",
            "outside (0, 100]",
        ),
        (
            {
                "hyperparameters": {"learning_rate_multiplier": 2},
                "extra_body": {"graft": {"hyperparameters": {"learning_rate": 1e-4}}},
            },
            "hyperparameters.learning_rate_multiplier",
            "give one of them",
        ),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", "outside"),
        ({"hyperparameters": {"n_epochs": "many"}}, "hyperparameters.n_epochs", "auto"),
        ({"hyperparameters": {"batch_size": 1.5}}, "hyperparameters.batch_size", "whole"),
        ({"hyperparameters": {"bathc_size": 1}}, "hyperparameters.bathc_size", "did you mean 'batch_size'"),
        ({"method": {"type": "distillation"}}, "method.type", "'distillation' is not a method"),
        ({"method": {"type": "dpo", "dpo": {}}}, "training_file", "from which preference cannot learn"),
        ({"method": {"type": "reinforcement"}}, "training_file", "method.reinforcement.grader: is required"),
        ({"extra_body": {"graft": {"tuning": "some"}}}, "graft.tuning", "lora, last_layers, full"),
        ({"extra_body": {"graft": {"tuning": "full", "served_as": "adapter"}}}, "graft.served_as", "low_rank_delta"),
        ({"extra_body": {"graft": {"served_as": "merged_model"}}}, "graft.served_as", "as it is"),
        ({"extra_body": {"graft": {"lora": {"base_quantization": "nf4"}}}}, "graft.lora.base_quantization", "a GPU"),
        ({"extra_body": {"graft": {"lora": {"modules_to_save": ["x"]}}}}, "graft.lora.modules_to_save[0]", "lm_head"),
        ({"extra_body": {"graft": {"from_adapter": "other:a@1"}}}, "graft.from_adapter", "no adapter of"),
        (
            {"extra_body": {"graft": {"hyperparameters": {"early_stopping_patience": 2}}}},
            "graft.hyperparameters.early_stopping_patience",
            "held-out loss",
        ),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations", "MLflow"),
        ({"suffix": "Not A Name"}, "suffix", "not a name"),
        ({"seed": -1}, "seed", "outside"),
        ({"metadata": {"k": 1}}, "metadata", "strings"),
        ({"extra_body": {"colour": "red"}}, "colour", "not a field"),
        ({"extra_body": {"graft": {"lora": {"rank": 65}}}}, "graft.lora.rank", "cannot be loaded"),
        ({"extra_body": {"graft": {"lora": {"target_modules": ["x"]}}}}, "graft.lora.target_modules[0]", "q_proj"),
        ({"extra_body": {"graft": {"lora": 3}}}, "graft.lora", "object"),
        (
            {"extra_body": {"graft": {"hyperparameters": {"learning_rate": 2}}}},
            "graft.hyperparameters.learning_rate",
            "2",
        ),
        (
            {"extra_body": {"graft": {"hyperparameters": {"max_steps": True}}}},
            "graft.hyperparameters.max_steps",
            "whole",
        ),
        (
            {"hyperparameters": {"n_epochs": 1}, "extra_body": {"graft": {"hyperparameters": {"epochs": 2}}}},
            "graft.hyperparameters.epochs",
            "differs",
        ),
    ],
)
async def test_what_cannot_be_honoured_is_refused_naming_the_parameter_as_sent(
    tmp_path: Path, fields: dict[str, Any], param: str, told: str
) -> None:
    async with http_gateway(tmp_path) as it:
        with pytest.raises(openai.BadRequestError) as caught:
            await created(it, **fields)
        assert caught.value.param == param
        assert told in caught.value.message
        assert caught.value.code == "invalid_job"
        assert [job async for job in it.client.fine_tuning.jobs.list()] == []


async def test_a_job_over_what_does_not_exist_is_404_naming_what_does(tmp_path: Path) -> None:
    async with http_gateway(tmp_path) as it:
        data = (await uploaded(it)).id
        for fields, param, existing in (
            ({"training_file": "nothing"}, "training_file", data),
            ({"training_file": data, "validation_file": "nothing"}, "validation_file", data),
            ({"training_file": data, "model": "nothing"}, "model", BASE),
        ):
            with pytest.raises(openai.NotFoundError) as caught:
                await created(it, **fields)
            assert caught.value.param == param
            assert existing in caught.value.message
        jobs = it.client.fine_tuning.jobs
        for call in (jobs.retrieve, jobs.cancel, jobs.list_events, jobs.checkpoints.list):
            with pytest.raises(openai.NotFoundError, match="nothing"):
                await call("nothing")


def test_all_faults_of_a_body_are_told_together() -> None:
    with pytest.raises(InvalidArgument) as caught:
        job_spec({"seed": "x", "metadata": [], "graft": {"lora": {"rank": float("inf")}}})
    assert {fault.field for fault in caught.value.violations} == {
        "model",
        "training_file",
        "seed",
        "metadata",
        "graft.lora.rank",
    }


def test_every_state_has_a_status_that_the_client_knows() -> None:
    known = {"validating_files", "queued", "running", "succeeded", "failed", "cancelled"}
    assert set(STATUSES) == set(JobState)
    assert set(STATUSES.values()) == known


async def test_of_many_fields_that_are_not_known_the_first_are_named_and_the_others_counted(
    tmp_path: Path,
) -> None:
    async with http_gateway(tmp_path) as it:
        body = {"model": BASE, "training_file": "ds-1", **{f"field{number}": 1 for number in range(500)}}
        error = (await it.raw.post("/v1/fine_tuning/jobs", json=body)).json()["error"]
        assert error["message"].count("is not a field here") == 20
        assert error["message"].endswith("body: has 480 more fields that are not known.")
