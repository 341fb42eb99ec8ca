"""Jobs through the public gRPC door: checked whole at creation, followed from any cursor to the end."""

import asyncio
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict

from graft.api.v1 import fine_tuning_service_pb2
from graft.api.v1.dataset_service_pb2_grpc import DatasetServiceStub
from graft.api.v1.fine_tuning_job_pb2 import (
    BASE_QUANTIZATION_NF4,
    SHARDING_ALWAYS,
    SHARDING_AUTO,
    FineTuningJob,
    Hyperparameters,
    LastLayersTuning,
    LoraTuning,
    ReinforcementMethod,
    Sweep,
)
from graft.api.v1.fine_tuning_service_pb2_grpc import FineTuningServiceStub
from graft.domain.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from graft.domain.jobs import Checkpoint, EventLevel, Job, JobError, JobState, Progress, Resolved, ServedAs
from tests.support.gateways import BASE, NOW, ROWS, Gateway, base_model, drained, gateway, refused, registry
from tests.unit.test_gateway_datasets import pieces

HELD_OUT = Hyperparameters(validation_fraction=0.1)
Create = fine_tuning_service_pb2.CreateFineTuningJobRequest
Get = fine_tuning_service_pb2.GetFineTuningJobRequest
Watch = fine_tuning_service_pb2.WatchFineTuningJobRequest


async def uploaded(it: Gateway, rows: bytes = ROWS) -> str:
    return str((await DatasetServiceStub(it.channel).UploadDataset(pieces(rows))).name)


async def created(it: Gateway, request_id: str = "", **fields: Any) -> FineTuningJob:
    fields = {"base_model": BASE, "training_dataset": await uploaded(it)} | fields
    request = Create(parent="projects/default", fine_tuning_job=FineTuningJob(**fields), request_id=request_id)
    job: FineTuningJob = await FineTuningServiceStub(it.channel).CreateFineTuningJob(request)
    return job


async def claimed(it: Gateway) -> Job:
    (job,) = await it.store.claim_jobs("test", timedelta(seconds=60), 1)
    return job


async def moved(it: Gateway, job: Job, *states: JobState, **ending: Any) -> Job:
    for state in states:
        last = ending if state is states[-1] else {}
        job = await it.store.transition(job, "test", state, message=f"now {state}", **last)
    return job


async def test_a_created_job_says_what_was_asked_for_and_waits_in_validating(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        job = await created(
            it,
            suffix="reviews",
            lora=LoraTuning(rank=8, target_modules=["q_proj"]),
            hyperparameters=Hyperparameters(epochs=2, seed=0),
            metadata={"owner": "me"},
        )
        assert job.name.startswith("projects/default/fineTuningJobs/ft-")
        assert job.state == FineTuningJob.STATE_VALIDATING
        assert job.attempt == 1
        assert job.hyperparameters.HasField("seed")
        assert not job.hyperparameters.HasField("batch_size")
        assert (job.lora.rank, list(job.lora.target_modules), job.suffix) == (8, ["q_proj"], "reviews")
        assert dict(job.metadata) == {"owner": "me"}
        assert job.WhichOneof("method") == "supervised"
        needed = job.memory_estimate
        parts = (needed.weights_bytes, needed.gradients_bytes, needed.optimizer_bytes, needed.activations_bytes)
        assert sum(parts) == needed.total_bytes
        assert needed.optimizer_bytes == 2 * needed.gradients_bytes == 2 * 4 * 30 * 8 * (576 + 576)
        stub = FineTuningServiceStub(it.channel)
        assert await stub.GetFineTuningJob(Get(name=job.name)) == job
        listed = await stub.ListFineTuningJobs(
            fine_tuning_service_pb2.ListFineTuningJobsRequest(parent="projects/default")
        )
        assert list(listed.fine_tuning_jobs) == [job]


async def test_a_retried_create_returns_the_first_ones_job(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        dataset = await uploaded(it)
        first = await created(it, request_id="one", training_dataset=dataset)
        assert await created(it, request_id="one", training_dataset=dataset) == first
        assert (await created(it, request_id="two", training_dataset=dataset)).name != first.name
        # An answer may be lost for so long that what was asked for could not be asked for any more.
        await it.store.replace_base_models(())
        assert await created(it, request_id="one", training_dataset=dataset) == first


async def test_a_page_that_would_be_larger_than_a_message_may_be_is_a_shorter_one(tmp_path: Path) -> None:
    async with gateway(tmp_path, GRAFT_GATEWAY_MAX_MESSAGE_BYTES="20000") as it:
        long = {f"{number}": "x" * 512 for number in range(16)}
        made = [(await created(it, metadata=long)).name for _ in range(5)]
        asked = fine_tuning_service_pb2.ListFineTuningJobsRequest(parent="projects/default", page_size=1000)
        found: list[str] = []
        pages = 0
        while asked.page_token or not pages:
            page = await FineTuningServiceStub(it.channel).ListFineTuningJobs(asked)
            found += [job.name for job in page.fine_tuning_jobs]
            asked.page_token = page.next_page_token
            pages += 1
        assert found == made[::-1]
        assert pages > 2


async def test_a_list_that_is_far_too_long_is_one_fault_and_is_not_looked_through(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        for fields, fault in (
            ({"lora": LoraTuning(target_modules=["q_proj"] * 500)}, "lora.target_modules"),
            ({"lora": LoraTuning(modules_to_save=["lm_head"] * 500)}, "lora.modules_to_save"),
            ({"sweep": Sweep(ranks=[8] * 500), "hyperparameters": HELD_OUT}, "sweep.ranks"),
            ({"sweep": Sweep(learning_rates=[2.0] * 500), "hyperparameters": HELD_OUT}, "sweep.learning_rates"),
        ):
            error = await refused(created(it, **fields))
            assert [one.field for one in error.violations] == [fault]
            assert "500" in error.message


async def test_all_faults_of_a_job_are_reported_together(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        with_faults = created(
            it,
            suffix="My Model",
            training_dataset="projects/default/datasets/ds-none",
            lora=LoraTuning(rank=65, dropout=1.0, alpha=-1, target_modules=["q_proj", "lm_head", "q_proj"]),
            hyperparameters=Hyperparameters(
                epochs=0, learning_rate=2, learning_rate_multiplier=2, context_tokens=4096, batch_size=-1
            ),
        )
        error = await refused(with_faults)
        assert isinstance(error, InvalidArgument)
        assert {violation.field for violation in error.violations} == {
            "suffix",
            "training_dataset",
            "lora.rank",
            "lora.dropout",
            "lora.alpha",
            "lora.target_modules[1]",
            "lora.target_modules[2]",
            "hyperparameters.epochs",
            "hyperparameters.learning_rate",
            "hyperparameters.learning_rate_multiplier",
            "hyperparameters.context_tokens",
            "hyperparameters.batch_size",
        }
        told = {violation.field: violation.description for violation in error.violations}
        assert "1 to 64" in told["lora.rank"]
        assert "q_proj, v_proj" in told["lora.target_modules[1]"]
        assert "2048" in told["hyperparameters.context_tokens"]


async def test_a_rank_above_what_the_engine_was_started_with_is_refused(tmp_path: Path) -> None:
    async with gateway(tmp_path, GRAFT_SERVING_MAX_LORA_RANK="16") as it:
        error = await refused(created(it, lora=LoraTuning(rank=32)))
        assert [violation.field for violation in error.violations] == ["lora.rank"]
        assert "1 to 16" in error.message


async def test_more_last_blocks_than_the_base_has_are_refused_when_the_job_is_created(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        job = await created(it, last_layers=LastLayersTuning(blocks=30))
        assert job.last_layers.blocks == 30
        error = await refused(created(it, last_layers=LastLayersTuning(blocks=31)))
        assert isinstance(error, InvalidArgument)
        (fault,) = error.violations
        assert fault.field == "last_layers.blocks"
        assert fault.description.startswith(f"31 are asked for, and {BASE} has 30; use 1 to 30")
        shallow = replace(base_model(), shape=replace(base_model().shape, blocks=1))
        await it.store.replace_base_models([shallow])
        (fault,) = (await refused(created(it, last_layers=LastLayersTuning()))).violations
        assert fault.description.startswith(f"2 are asked for, and {BASE} has 1; use 1 to 1")
        await it.store.replace_base_models([replace(base_model(), shape=None)])
        assert (await created(it, last_layers=LastLayersTuning(blocks=31))).last_layers.blocks == 31


@pytest.mark.parametrize(
    ("of_start", "asked", "field", "told"),
    [
        ({}, {"lora": LoraTuning(rank=16)}, "lora.rank", "asks for 16, and smollm2-135m:reviews@3"),
        ({}, {"lora": LoraTuning(use_dora=True)}, "lora.use_dora", "is nothing that smollm2-135m:reviews@3"),
        ({}, {"lora": LoraTuning(modules_to_save=["lm_head"])}, "lora.modules_to_save", "is nothing that"),
        ({"base_model_digest": "sha256:old"}, {}, "from_adapter", "other weights of smollm2-135m (sha256:old)"),
        ({"served_as": ServedAs.MERGED_MODEL}, {}, "from_adapter", "is a full model"),
    ],
)
async def test_a_start_that_the_job_cannot_go_on_from_is_refused_when_it_is_created(
    tmp_path: Path, of_start: dict[str, Any], asked: dict[str, Any], field: str, told: str
) -> None:
    async with gateway(tmp_path) as it:
        known = registry()
        versions = tuple(replace(one, **of_start) for one in known.versions)
        await it.store.replace_registry(replace(known, versions=versions))
        error = await refused(created(it, from_adapter=f"{BASE}:reviews", **asked))
        (fault,) = error.violations
        assert fault.field == field
        assert told in fault.description


async def test_a_start_of_the_shape_that_is_asked_for_is_taken(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        job = await created(it, from_adapter=f"{BASE}:reviews", lora=LoraTuning(rank=8))
        assert job.from_adapter == f"{BASE}:reviews@3"


async def test_a_base_is_spread_over_the_workers_of_a_job_that_asks_for_it_and_each_needs_less(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        spread = await created(it, hyperparameters=Hyperparameters(sharding=SHARDING_ALWAYS, num_workers=4))
        copied = await created(it, hyperparameters=Hyperparameters(num_workers=4))
        assert (spread.hyperparameters.sharding, copied.hyperparameters.sharding) == (SHARDING_ALWAYS, SHARDING_AUTO)
        assert spread.memory_estimate.weights_bytes < copied.memory_estimate.weights_bytes


@pytest.mark.parametrize(
    ("fields", "workers", "field", "told"),
    [
        ({}, 1, "hyperparameters.sharding", "set num_workers to 2 or more"),
        ({"sweep": Sweep()}, None, "hyperparameters.sharding", "each trial of a sweep is one worker"),
        ({"reinforcement": ReinforcementMethod()}, 2, "hyperparameters.sharding", "after each update"),
        (
            {"lora": LoraTuning(base_quantization=BASE_QUANTIZATION_NF4)},
            2,
            "lora.base_quantization",
            "cannot be spread",
        ),
        ({"lora": LoraTuning(use_dora=True)}, 2, "lora.use_dora", "merged into a whole copy"),
        ({"lora": LoraTuning(modules_to_save=["lm_head"])}, 2, "lora.modules_to_save", "merged into a whole copy"),
    ],
)
async def test_what_cannot_be_spread_is_refused_at_once_with_the_reason(
    fields: dict[str, Any], workers: int | None, field: str, told: str, tmp_path: Path
) -> None:
    async with gateway(tmp_path, GRAFT_TRAINING_QUANTIZED_BASE="true") as it:
        error = await refused(
            created(it, **fields, hyperparameters=Hyperparameters(sharding=SHARDING_ALWAYS, num_workers=workers))
        )
        assert isinstance(error, InvalidArgument)
        assert told in " ".join(fault.description for fault in error.violations if fault.field == field)


async def test_unknown_names_alone_are_not_found_and_say_what_exists(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        existing = (await uploaded(it)).rsplit("/", 1)[1]
        error = await refused(created(it, base_model="gpt-9"))
        assert isinstance(error, NotFound)
        assert BASE in error.message
        error = await refused(created(it, training_dataset="projects/default/datasets/ds-none"))
        assert isinstance(error, NotFound)
        assert "ds-none" in error.message
        assert existing in error.message


async def test_a_validation_set_with_the_training_rows_is_refused(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        error = await refused(created(it, validation_dataset=await uploaded(it)))
        assert [violation.field for violation in error.violations] == ["validation_dataset"]


async def test_all_linear_means_every_module_and_a_reserved_suffix_is_refused(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        assert list((await created(it, lora=LoraTuning(target_modules=["all-linear"]))).lora.target_modules) == []
        assert [fault.field for fault in (await refused(created(it, suffix="v1"))).violations] == ["suffix"]


async def test_a_finished_job_shows_everything_that_came_of_it(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        name = (await created(it, suffix="reviews")).name
        job = await moved(it, await claimed(it), JobState.QUEUED, JobState.STARTING, JobState.RUNNING)
        job = await it.store.record(
            job,
            "test",
            progress=Progress(3, 10, 0.3, 1.5, 120.0, 900, 12.5),
            resolved=[
                Resolved("lora.rank", 8, True, "default"),
                Resolved("lora.target_modules", ["q_proj", "v_proj"], True, "all linear layers"),
            ],
            metrics={"train_loss": 1.5},
            checkpoint=Checkpoint(3, NOW, "file:///c/3", 1, {"train_loss": 1.5}),
            event=(EventLevel.INFO, "metrics", "step 3", {"step": 3, "loss": 1.5}),
        )
        await moved(it, job, JobState.REGISTERING, JobState.EVALUATING)
        job = await it.store.transition(
            (await it.store.get_job("default", job.id)),
            "test",
            JobState.SUCCEEDED,
            message="done",
            fine_tuned_model=f"{BASE}:reviews@4",
        )
        stub = FineTuningServiceStub(it.channel)
        told = await stub.GetFineTuningJob(Get(name=name))
        assert told.state == FineTuningJob.STATE_SUCCEEDED
        assert told.fine_tuned_model == f"{BASE}:reviews@4"
        assert told.progress.remaining.ToMilliseconds() == 12_500
        assert told.metrics["train_loss"] == 1.5
        assert [MessageToDict(one).get("value") for one in told.resolved_hyperparameters] == [8.0, ["q_proj", "v_proj"]]
        assert told.HasField("start_time")
        assert told.HasField("end_time")
        checkpoints = await stub.ListFineTuningJobCheckpoints(
            fine_tuning_service_pb2.ListFineTuningJobCheckpointsRequest(parent=name)
        )
        assert [(one.step, one.uri) for one in checkpoints.checkpoints] == [(3, "file:///c/3")]
        events = fine_tuning_service_pb2.ListFineTuningJobEventsRequest(parent=name, page_size=3)
        first = await stub.ListFineTuningJobEvents(events)
        events.page_token = first.next_page_token
        second = await stub.ListFineTuningJobEvents(events)
        sequences = [event.sequence for event in (*first.events, *second.events)]
        assert sequences == list(range(1, len(sequences) + 1))
        assert len(first.events) == 3


async def test_a_failed_job_carries_its_error_as_a_status(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        name = (await created(it)).name
        error = JobError("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY", "The worker ran out of memory.")
        await moved(it, await claimed(it), JobState.FAILED, error=error)
        told = await FineTuningServiceStub(it.channel).GetFineTuningJob(Get(name=name))
        assert (told.error.code, told.error.message) == (8, "The worker ran out of memory.")


async def test_watch_sends_every_event_as_it_comes_and_ends_with_the_job(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        name = (await created(it)).name
        stub = FineTuningServiceStub(it.channel)
        watching = asyncio.create_task(drained(stub.WatchFineTuningJob(Watch(name=name))))
        await asyncio.sleep(0.3)
        await moved(it, await claimed(it), JobState.QUEUED, JobState.STARTING, JobState.RUNNING)
        await asyncio.sleep(0.3)
        assert not watching.done()
        await it.store.transition(
            await it.store.get_job("default", name.rsplit("/", 1)[1]), "test", JobState.CANCELLED, message="stopped"
        )
        answers = await asyncio.wait_for(watching, 20)
        assert [answer.event.sequence for answer in answers] == [1, 2, 3, 4, 5]
        assert answers[-1].fine_tuning_job.state == FineTuningJob.STATE_CANCELLED
        resumed = await drained(stub.WatchFineTuningJob(Watch(name=name, after_sequence=3)))
        assert [answer.event.sequence for answer in resumed] == [4, 5]


async def test_watch_tells_at_a_drain_from_where_to_resume(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        name = (await created(it)).name
        watch = FineTuningServiceStub(it.channel).WatchFineTuningJob(Watch(name=name))
        assert (await watch.read()).event.sequence == 1
        it.core.drain()
        error = await refused(watch.read())
        assert isinstance(error, Unavailable)
        assert error.metadata == {"after_sequence": "1"}
        assert error.retry_after_seconds


async def test_watching_an_unknown_job_is_not_found(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        missing = Watch(name="projects/default/fineTuningJobs/ft-none")
        error = await refused(drained(FineTuningServiceStub(it.channel).WatchFineTuningJob(missing)))
        assert isinstance(error, NotFound)


async def test_cancel_is_a_wish_that_may_be_repeated_until_the_job_has_succeeded(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        name = (await created(it)).name
        stub = FineTuningServiceStub(it.channel)
        cancel = fine_tuning_service_pb2.CancelFineTuningJobRequest(name=name)
        for _ in range(2):
            job = await stub.CancelFineTuningJob(cancel)
            assert job.cancel_requested
            assert job.state == FineTuningJob.STATE_VALIDATING
        await moved(it, await claimed(it), JobState.FAILED, error=JobError("INTERNAL", "BROKEN", "broken"))
        assert isinstance(await refused(stub.CancelFineTuningJob(cancel)), FailedPrecondition)


@pytest.mark.parametrize("page_token", ["x", "-1", "9" * 30])
async def test_a_foreign_page_token_is_refused(tmp_path: Path, page_token: str) -> None:
    async with gateway(tmp_path) as it:
        request = fine_tuning_service_pb2.ListFineTuningJobEventsRequest(
            parent="projects/default/fineTuningJobs/ft-none", page_token=page_token
        )
        error = await refused(FineTuningServiceStub(it.channel).ListFineTuningJobEvents(request))
        assert error.reason == "INVALID_PAGE_TOKEN"
