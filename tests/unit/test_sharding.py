"""When a base is spread over the workers, and that each then needs room for its part alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.domain.errors import FailedPrecondition
from graft.domain.jobs import LastLayers, Lora, Method, Sharding, Tuning
from graft.domain.memory import memory_bytes
from graft.training import tuning
from graft.training.memory import read_shape
from graft.training.objectives.objective import ALONE, Group
from graft.training.spec import RunSpec
from graft.training.tuning import load_base, wants_sharding
from tests.support.run_specs import tiny_run
from tests.support.tiny_llama import make_tiny_llama

CPU, GPU = torch.device("cpu"), torch.device("cuda")
ALIKE = Group(0, 2, lambda tensor: tensor.mul_(2))
"""Two workers, of which the other says what this one says."""
AUTO, ALWAYS, NEVER = Sharding.AUTO, Sharding.ALWAYS, Sharding.NEVER


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> RunSpec:
    base = make_tiny_llama(tmp_path_factory.mktemp("base"), layers=12)
    return tiny_run(base, "nowhere", "nowhere", tuning=Tuning.FULL, lora=Lora())


def _needed_bytes(spec: RunSpec, workers: int) -> int:
    shape = read_shape(Path(spec.base_model_path))
    return memory_bytes(shape, spec.tuning, spec.lora, LastLayers(), workers).total_bytes


def _holding(monkeypatch: pytest.MonkeyPatch, memory_bytes: int) -> None:
    monkeypatch.setattr(tuning, "node_memory_bytes", lambda _: memory_bytes)


@pytest.mark.parametrize(
    ("sharding", "device", "fits", "group", "expected"),
    [
        (AUTO, GPU, False, ALIKE, True),
        (AUTO, GPU, True, ALIKE, False),
        (AUTO, GPU, False, ALONE, False),
        (AUTO, CPU, False, ALIKE, False),
        (ALWAYS, GPU, True, ALIKE, True),
        (ALWAYS, CPU, True, ALIKE, True),
        (ALWAYS, CPU, True, ALONE, False),
        (NEVER, GPU, False, ALIKE, False),
    ],
)
def test_a_base_is_spread_where_a_gpu_does_not_hold_a_copy_or_the_job_asks_for_it(
    sharding: Sharding,
    device: torch.device,
    fits: bool,
    group: Group,
    expected: bool,
    spec: RunSpec,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _holding(monkeypatch, _needed_bytes(spec, 1) - (0 if fits else 1))
    assert wants_sharding(replace(spec, sharding=sharding), device, group) is expected


@pytest.mark.parametrize(
    "changes",
    [
        {"method": Method.REINFORCEMENT},
        {"tuning": Tuning.LORA, "lora": Lora(4, 8.0, 0.0, ("q_proj",), use_dora=True)},
        {"tuning": Tuning.LORA, "lora": Lora(4, 8.0, 0.0, ("q_proj",), modules_to_save=("lm_head",))},
        {"tuning": Tuning.LORA, "lora": Lora(4, 8.0, 0.0, ("q_proj",), base_quantization="nf4")},
    ],
)
def test_what_cannot_be_spread_is_copied(
    changes: dict[str, Any], spec: RunSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    _holding(monkeypatch, 1)
    assert not wants_sharding(replace(spec, **changes), GPU, ALIKE)


def test_one_worker_whose_gpu_is_too_small_has_all_spread_their_base(
    spec: RunSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    _holding(monkeypatch, _needed_bytes(spec, 1))
    smaller = Group(0, 2, lambda votes: votes.add_(1))  # the other has a GPU too, and lacks room on it
    assert wants_sharding(spec, GPU, smaller)


def test_workers_with_and_without_a_gpu_cannot_share_a_base(spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    _holding(monkeypatch, 1)
    differing = Group(0, 2, lambda _: None)  # the other has nothing to add: no GPU
    with pytest.raises(FailedPrecondition, match="of which 1 have a GPU") as caught:
        wants_sharding(spec, GPU, differing)
    assert caught.value.reason == "WORKERS_DIFFER"


def test_of_a_spread_base_a_worker_has_to_hold_its_part_alone(spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    sharded = replace(ALIKE, sharded=True)
    _holding(monkeypatch, _needed_bytes(spec, 2))
    assert load_base(spec, CPU, sharded).num_parameters() > 0
    with pytest.raises(FailedPrecondition) as caught:
        load_base(spec, CPU, ALIKE)
    assert caught.value.reason == "DOES_NOT_FIT"
    _holding(monkeypatch, _needed_bytes(spec, 2) - 1)
    with pytest.raises(FailedPrecondition) as caught:
        load_base(spec, CPU, sharded)
    assert caught.value.reason == "DOES_NOT_FIT"
