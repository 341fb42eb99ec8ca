import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from graft.data.prepare import Example
from graft.training.batching import microbatches
from graft.training.depth import angular_distances, by_angle, cut, evenly
from graft.training.packing import PACKED, token_losses
from tests.support.tiny_llama import make_tiny_llama

EXAMPLES = [Example(list(range(3 + seed, 23 + seed)), [1] * 20) for seed in range(3)]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("deep"), layers=5)


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=PACKED, dtype=torch.float32)


def test_the_first_and_the_last_layer_stay_however_little_they_turn() -> None:
    assert by_angle([0.0, 0.3, 0.1, 0.2, 0.0], 2) == [0, 4]
    assert by_angle([0.0, 0.3, 0.1, 0.2, 0.0], 4) == [0, 1, 3, 4]
    assert evenly(30, 2) == [0, 29]
    assert evenly(5, 3) == [0, 2, 4]
    assert all(len(set(evenly(30, keep))) == keep for keep in range(2, 31))


def test_a_layer_that_does_nothing_has_no_angle_and_goes_first(deep: Path) -> None:
    model = load(deep)
    idle = model.model.layers[2]
    torch.nn.init.zeros_(idle.self_attn.o_proj.weight)
    torch.nn.init.zeros_(idle.mlp.down_proj.weight)
    rows = list(microbatches(EXAMPLES))
    distances = angular_distances(model, rows)
    assert distances[2] < 1e-3
    assert min(distances[:2] + distances[3:]) > 1e-2
    with torch.no_grad():
        before = token_losses(model, rows[0])
        cut(model, by_angle(distances, 4))
        torch.testing.assert_close(token_losses(model, rows[0]), before)


def test_the_angle_of_a_single_token_row_is_the_one_between_its_states(deep: Path) -> None:
    model = load(deep)
    row = next(microbatches([Example([5, 9], [1, 1])]))
    with torch.no_grad():
        states = model.model(input_ids=row.token_ids_N[None], output_hidden_states=True, lengths=(2,)).hidden_states
        cosine = torch.nn.functional.cosine_similarity(states[1][0, 1], states[2][0, 1], dim=-1)
    assert angular_distances(model, [row])[1] == pytest.approx(math.acos(float(cosine)) / math.pi, abs=1e-5)


def test_a_cut_model_is_saved_and_loaded_with_its_depth_and_computes_the_same(deep: Path, tmp_path: Path) -> None:
    model = load(deep)
    cut(model, [0, 3, 4])
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    row = next(microbatches(EXAMPLES))
    assert again.config.num_hidden_layers == 3
    with torch.no_grad():
        torch.testing.assert_close(token_losses(again, row), token_losses(model, row))
