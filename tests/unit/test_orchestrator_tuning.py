"""A job's way through the orchestrator by what it tunes: what is registered, what is served, what it starts from."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from graft.domain.errors import InvalidArgument
from graft.domain.jobs import JobState, Lora, Memory, ServedAs, Tuning
from graft.domain.names import CHAMPION
from graft.orchestrator.starting import take_over
from tests.support.orchestration import BASE, KEY, World, world

HAS = Lora(rank=4, alpha=8.0, target_modules=("q_proj", "v_proj"))


def _start(it: World, folder: Path) -> None:
    """A version that the next job can start from."""
    config = {"r": HAS.rank, "lora_alpha": HAS.alpha, "target_modules": list(HAS.target_modules)}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    version = it.registry.add(BASE, "first", "job-0")
    it.registry.folders["default--tiny--first", 1, version.digest] = folder


async def test_a_model_of_its_own_is_registered_but_not_loaded_and_the_way_to_serve_it_is_told(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        it.runs.also_writes = ("model", "trained_adapter")
        await it.create_job("job-1", tuning=Tuning.FULL, served_as=ServedAs.MERGED_MODEL)
        async with it.orchestrator():
            job = await it.until("job-1", JobState.SUCCEEDED)
        (published,) = it.registry.published
        root = it.parts.output_dir(job)
        assert (published.folder, published.model_folder) == (None, root / "model")
        assert (published.served_as, published.tuning, published.rank) == (ServedAs.MERGED_MODEL, Tuning.FULL, 0)
        assert it.engine.loaded == []
        told = next(event for event in await it.events("job-1") if event.data.get("key") == "deploy")
        assert f"graft models deploy {BASE}:reviews@1" in told.message
        assert job.fine_tuned_model == f"{BASE}:reviews@1"
        assert job.metrics["trained_tokens"] == 30
        assert it.registry.aliases[KEY] == {CHAMPION: 1}
        version = await it.store.resolve_version(*KEY, version=1, alias=None)
        assert version.served_as is ServedAs.MERGED_MODEL


async def test_a_low_rank_delta_is_loaded_and_registered_with_the_model_beside_it(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        it.runs.also_writes = ("model",)
        await it.create_job("job-1", tuning=Tuning.FULL, served_as=ServedAs.LOW_RANK_DELTA)
        async with it.orchestrator():
            job = await it.until("job-1", JobState.SUCCEEDED)
        (published,) = it.registry.published
        root = it.parts.output_dir(job)
        assert (published.folder, published.model_folder) == (root / "adapter", root / "model")
        assert published.trained_folder is None
        assert [ref.model for ref in it.engine.loaded] == [f"{BASE}:reviews@1"]


async def test_a_model_that_the_run_did_not_leave_fails_the_job(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        await it.create_job("job-1", tuning=Tuning.FULL, served_as=ServedAs.MERGED_MODEL)
        async with it.orchestrator():
            job = await it.until("job-1", JobState.FAILED)
        assert job.error is not None
        assert "runs/job-1/1/model lacks config.json" in job.error.message


async def test_the_memory_that_training_needs_is_told_before_it_starts(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        it.preparer.memory = Memory(500_000_000, 500_000_000, 1_000_000_000, 1_500_000_000)
        await it.create_job("job-1")
        async with it.orchestrator():
            await it.until("job-1", JobState.SUCCEEDED)
        events = await it.events("job-1")
        keys = [event.data.get("key") or event.data.get("state") for event in events]
        assert keys.index("memory") < keys.index("QUEUED")
        told = events[keys.index("memory")]
        assert told.message == (
            "Training needs about 3.5 GB (weights 0.5, gradients 0.5, AdamW 1, activations 1.5) in a worker."
        )
        assert told.data["total_bytes"] == 3_500_000_000


async def test_lora_that_starts_from_an_adapter_takes_its_shape_over_and_says_so(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        _start(it, tmp_path / "first")
        async with it.orchestrator() as running:
            await running.mirror.refresh()
            await it.create_job("job-1", from_adapter=f"{BASE}:first@1", lora=Lora(dropout=0.1))
            job = await it.until("job-1", JobState.SUCCEEDED)
        (prepared,) = it.preparer.prepared
        assert prepared.spec.lora == Lora(4, 8.0, 0.1, ("q_proj", "v_proj"))
        assert job.spec.lora == Lora(dropout=0.1)
        rank = next(item for item in job.resolved if item.name == "lora.rank")
        assert (rank.value, rank.derived, rank.reason) == (4, True, f"As {BASE}:first@1 has it.")
        start = it.runs.specs[0].start_from
        assert (start.model, start.registered_model, start.version) == (f"{BASE}:first@1", "default--tiny--first", 1)
        assert (start.digest, start.served_as) == ("sha256:job-0", ServedAs.ADAPTER)
        assert (start.tracking_uri, start.cache) == (
            it.parts.settings.tracking_uri,
            str(it.parts.settings.home.cache),
        )


async def test_lora_of_another_shape_than_it_starts_from_fails_the_job(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        _start(it, tmp_path / "first")
        async with it.orchestrator() as running:
            await running.mirror.refresh()
            await it.create_job("job-1", from_adapter=f"{BASE}:first@1", lora=Lora(rank=16))
            job = await it.until("job-1", JobState.FAILED)
        assert job.error is not None
        assert job.error.message.startswith(
            f"lora.rank: asks for 16, and {BASE}:first@1, which training starts from, has 4."
        )


def test_every_field_that_differs_from_the_start_is_named() -> None:
    asked = Lora(rank=4, alpha=9.0, target_modules=("v_proj", "q_proj"), use_dora=True, modules_to_save=("lm_head",))
    with pytest.raises(InvalidArgument) as caught:
        take_over(asked, HAS, "m")
    assert [fault.field for fault in caught.value.violations] == ["lora.alpha", "lora.use_dora", "lora.modules_to_save"]
    assert take_over(Lora(rank=4, target_modules=("v_proj", "q_proj")), HAS, "m") == HAS


async def test_an_adapter_of_other_weights_of_the_base_is_no_start(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        _start(it, tmp_path / "first")
        (base,) = await it.store.list_base_models()
        async with it.orchestrator() as running:
            await running.mirror.refresh()
            await it.store.replace_base_models([replace(base, digest="sha256:other")])
            await it.create_job("job-1", from_adapter=f"{BASE}:first@1")
            job = await it.until("job-1", JobState.FAILED)
        assert job.error is not None
        assert job.error.reason == "BASE_MODEL_CHANGED"
