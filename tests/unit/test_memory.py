"""What training is told to need before its values are derived is what it is told to need after."""

from dataclasses import replace
from typing import Any

import pytest

from graft.data.prepare import DataStats
from graft.domain.jobs import Hyperparameters, Job, JobSpec, JobState, LastLayers, Lora, Sharding, Sweep, Tuning
from graft.domain.memory import WHOLE_BLOCKS, asked_memory, memory_bytes, sharing_workers
from graft.domain.shapes import Shape
from graft.training.derive import derive
from graft.training.spec import settled
from tests.support.gateways import NOW, base_model

SHAPE = Shape(30, 576, 1536, 576, 192, 49152, tied=True)
STATS = DataStats(
    row_count=100,
    example_count=100,
    tokens=1000,
    completion_tokens=500,
    longest_tokens=20,
    median_tokens=10,
    over_length_count=0,
)


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"lora": Lora(rank=4, target_modules=("q_proj",), base_quantization="nf4")},
        {"lora": Lora(use_dora=True, modules_to_save=("lm_head",))},
        {"tuning": Tuning.LAST_LAYERS},
        {"tuning": Tuning.LAST_LAYERS, "last_layers": LastLayers(blocks=5, train_head=True)},
        {"tuning": Tuning.FULL, "lora": Lora(rank=64)},
        {"tuning": Tuning.FULL, "hyperparameters": Hyperparameters(sharding=Sharding.ALWAYS, num_workers=8)},
    ],
)
def test_what_is_estimated_at_submission_is_what_training_estimates(asked: dict[str, Any]) -> None:
    spec = JobSpec("b", "ds", **asked)
    job = Job("ft-1", "default", spec, JobState.VALIDATING, NOW, NOW, resolved=derive(spec, base_model(), STATS))
    later = memory_bytes(SHAPE, spec.tuning, *settled(job), workers=sharing_workers(spec))
    assert asked_memory(spec, SHAPE, base_model().target_modules) == later


def test_the_rank_of_the_start_and_the_highest_rank_of_a_sweep_count() -> None:
    spec = JobSpec("b", "ds")

    def asking(rank: int) -> JobSpec:
        return replace(spec, lora=Lora(rank=rank))

    modules = base_model().target_modules
    assert asked_memory(spec, SHAPE, modules, start_rank=32) == asked_memory(asking(32), SHAPE, modules)
    swept = replace(spec, sweep=Sweep(ranks=(4, 16)))
    assert asked_memory(swept, SHAPE, modules) == asked_memory(asking(16), SHAPE, modules)
    # AdamW keeps two moments of each of SmolLM2-135M's 134,515,008 parameters.
    full = asked_memory(replace(spec, tuning=Tuning.FULL), SHAPE, modules)
    assert full.optimizer_bytes == 2 * 4 * 134_515_008


@pytest.mark.parametrize("tuning", Tuning)
def test_of_a_spread_base_a_worker_needs_its_part_of_the_blocks_the_rest_and_two_blocks_to_compute_with(
    tuning: Tuning,
) -> None:
    choice = (tuning, Lora(8, target_modules=("q_proj",)), LastLayers(3))
    copied, spread = (memory_bytes(SHAPE, *choice, workers=workers) for workers in (1, 30))
    block_bytes = 4 * SHAPE.block_parameters
    adapter_bytes = 4 * 8 * (576 + 576) if tuning is Tuning.LORA else 0  # of one block
    assert copied.weights_bytes - spread.weights_bytes == (29 - WHOLE_BLOCKS) * block_bytes + 29 * adapter_bytes
    trained_bytes = {
        Tuning.LORA: 30 * adapter_bytes,
        Tuning.LAST_LAYERS: 3 * block_bytes,
        Tuning.FULL: 30 * block_bytes,
    }
    saved_bytes = copied.optimizer_bytes - spread.optimizer_bytes
    assert saved_bytes == pytest.approx(2 * trained_bytes[tuning] * 29 / 30, rel=1e-6)
    assert spread.activations_bytes == copied.activations_bytes
    assert spread.gradients_bytes < copied.gradients_bytes
