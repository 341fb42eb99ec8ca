"""A base whose blocks are spread over two and three ranks learns, saves and reports what one worker with a copy does.

Ranks are processes on CPUs, joined by gloo; what differs on GPUs is the backend (docs/adr/0010).
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from graft.domain.jobs import LastLayers, Lora, Method, Preference, ServedAs, Sharding, Tuning
from graft.domain.resources import DatasetFormat
from graft.training.spec import RunSpec
from tests.support.ranks import Found, trained
from tests.support.run_specs import tiny_run
from tests.support.tiny_llama import make_tiny_llama

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

DELTA: dict[str, Any] = {"served_as": ServedAs.LOW_RANK_DELTA, "delta_rank": 8, "lora": Lora(), "learning_rate": 1e-3}
CHOICES: dict[str, dict[str, Any]] = {
    "lora": {},
    "last": {"tuning": Tuning.LAST_LAYERS, "last_layers": LastLayers(1, train_head=True), **DELTA},
    "full": {"tuning": Tuning.FULL, **DELTA},
    "preference": {
        "method": Method.PREFERENCE,
        "preference": Preference(0.2),
        "early_stopping_patience": 4,
        "eval_steps": 1,
        "total_steps": 30,
    },
}
SPREAD = [(choice, ranks) for choice in CHOICES for ranks in (2, 3)]


def _cases(folder: Path) -> dict[str, RunSpec]:
    # Of several lengths, so that ranks have unlike numbers of passes; and the last batch has fewer rows than ranks.
    asked = [(f"{'so ' * (n % 5 * 20)}{n} is ", ("even", "odd")[n % 2], ("odd", "even")[n % 2]) for n in range(21)]
    rows = {
        "plain": [{"prompt": prompt, "completion": right} for prompt, right, _ in asked],
        "judged": [{"prompt": prompt, "chosen": right, "rejected": wrong} for prompt, right, wrong in asked],
        "contrary": [{"prompt": prompt, "chosen": wrong, "rejected": right} for prompt, right, wrong in asked],
    }
    for name, items in rows.items():
        (folder / name).write_text("".join(json.dumps(item) + "\n" for item in items))
    base = make_tiny_llama(folder / "base", layers=3)
    cases = {}
    for choice, changes in CHOICES.items():
        data, held_out = ("judged", "contrary") if choice == "preference" else ("plain", "plain")
        layout = DatasetFormat.PREFERENCE if choice == "preference" else DatasetFormat.PROMPT_COMPLETION
        given = {
            "context_tokens": 512,
            "dataset_format": layout,
            "validation_path": str(folder / held_out),
            "validation_format": layout,
            "learning_rate": 3e-3,
            "batch_size": 10,
            "max_grad_norm": 0.1,
            "total_steps": 9,
            "checkpoint_steps": 4,
        }
        for name, workers, sharding in (
            ("alone", 1, Sharding.ALWAYS),
            ("copied", 2, Sharding.AUTO),
            ("2", 2, Sharding.ALWAYS),
            ("3", 3, Sharding.ALWAYS),
        ):
            mine = {**given, **changes, "num_workers": workers, "sharding": sharding}
            cases[f"{choice}-{name}"] = tiny_run(base, folder / data, folder / f"{choice}-{name}", **mine)
    for name in ("copied", "2"):
        sixteen = f"bfloat16-{name}"
        cases[sixteen] = replace(cases[f"lora-{name}"], output_dir=str(folder / sixteen), total_steps=3)
    return cases


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharding")


@pytest.fixture(scope="module")
def found(folder: Path) -> Mapping[str, Found]:
    return trained(_cases(folder), folder, ("bfloat16-copied", "bfloat16-2"))


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("choice", "ranks"), SPREAD)
def test_spread_over_ranks_a_base_learns_on_the_curve_of_one_worker_and_of_two_with_copies(
    choice: str, ranks: int, found: Mapping[str, Found]
) -> None:
    spread = found[f"{choice}-{ranks}"]
    assert spread.reports[0][1]["message"].endswith("the base's blocks spread over them.")
    for name in ("alone", "copied"):
        other = found[f"{choice}-{name}"]
        for metric in ("loss", "grad_norm", "validation_loss"):
            assert spread.told(metric) == pytest.approx(other.told(metric), rel=1e-4, abs=1e-5), (name, metric)
    assert max(spread.told("grad_norm")) > 0.1, "no gradient was clipped"
    assert [(kind, data.get("step")) for kind, data in spread.reports if kind == "checkpoint"] == [
        (kind, data.get("step")) for kind, data in found[f"{choice}-alone"].reports if kind == "checkpoint"
    ]
    last = found[f"{choice}-alone"].reports[-1][1]
    assert spread.reports[-1][1] == {
        name: pytest.approx(value, rel=1e-3, abs=1e-4) if isinstance(value, float) else value
        for name, value in last.items()
    }


@pytest.mark.parametrize(("choice", "ranks"), SPREAD)
def test_each_rank_holds_its_part_of_the_blocks_and_a_copy_of_the_rest(
    choice: str, ranks: int, found: Mapping[str, Found]
) -> None:
    whole, spread = found[f"{choice}-alone"], found[f"{choice}-{ranks}"]
    assert found[f"{choice}-copied"].block_bytes == whole.block_bytes * 2
    assert spread.other_bytes == whole.other_bytes * ranks
    # Rows do not divide by three: the first ranks have one more of each matrix.
    assert all(held < 1.05 * whole.block_bytes[0] / ranks for held in spread.block_bytes), spread.block_bytes


def _weights(path: Path, *, factored: bool) -> dict[str, torch.Tensor]:
    """Of a decomposition, whose factors are free in their signs, the products of A and B."""
    found = load_file(path)
    for name in [name for name in found if factored and "lora_A" in name]:
        found[name] = found.pop(name.replace("lora_A", "lora_B")) @ found[name]
    return found


@pytest.mark.parametrize(("choice", "ranks"), SPREAD)
def test_what_is_left_has_the_files_and_weights_of_one_worker(
    choice: str, ranks: int, found: Mapping[str, Found], folder: Path
) -> None:
    assert found
    whole, spread = folder / f"{choice}-alone", folder / f"{choice}-{ranks}"
    assert _files(spread) == _files(whole)
    for name in sorted(_files(whole)):
        if name.endswith(".safetensors"):
            mine, expected = (_weights(run / name, factored=choice in ("last", "full")) for run in (spread, whole))
            assert list(mine) == list(expected)
            for weight, value in expected.items():
                torch.testing.assert_close(mine[weight], value, rtol=1e-3, atol=2e-4, msg=f"{name}: {weight}")
        elif name.endswith("config.json"):
            mine, expected = (json.loads((run / name).read_text()) for run in (spread, whole))
            for config in (mine, expected):  # PEFT writes a set
                config["target_modules"] = sorted(config.get("target_modules", []))
            assert mine == expected


@pytest.mark.parametrize(("choice", "ranks"), SPREAD)
def test_what_is_left_loads_in_plain_peft_and_scores_its_probes(
    choice: str, ranks: int, found: Mapping[str, Found], folder: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert found
    run = folder / f"{choice}-{ranks}"
    loaded: dict[str, Any] = {
        "adapter": PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), run / "adapter")
    }
    if (run / "model").is_dir():
        loaded["model"] = AutoModelForCausalLM.from_pretrained(run / "model")
    assert ("model" in loaded) == (choice in ("last", "full"))
    for name, model in loaded.items():
        about = json.loads((run / name / "graft.json").read_text())
        assert len(about["probes"]) == 4
        for probe in about["probes"]:
            prompt, completion = probe["prompt_token_ids"], probe["completion_token_ids"]
            with torch.no_grad():
                logprobs = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
            scored = [float(logprobs[len(prompt) + n - 1, token]) for n, token in enumerate(completion)]
            assert sum(scored) / len(scored) == pytest.approx(probe["mean_logprob"], abs=1e-3)


def test_the_weights_of_the_lowest_held_out_loss_are_kept_by_all_ranks(found: Mapping[str, Found]) -> None:
    for name in ("alone", "2", "3"):
        end = found[f"preference-{name}"].reports[-1][1]
        losses = found[f"preference-{name}"].told("validation_loss")
        # Held out is the contrary of what is learned, so the best weights are left behind soon.
        assert losses.index(min(losses)) == end["best_step"] - 1 < len(losses) - 4 < 26


def test_adapters_in_float32_train_over_a_spread_base_in_bfloat16(found: Mapping[str, Found]) -> None:
    copied, spread = found["bfloat16-copied"], found["bfloat16-2"]
    assert "in bfloat16, the base's blocks spread" in spread.reports[0][1]["message"]
    assert spread.told("loss") == pytest.approx(copied.told("loss"), rel=1e-4)
    assert spread.told("grad_norm") == pytest.approx(copied.told("grad_norm"), rel=1e-4)
    assert spread.block_bytes[0] < 0.55 * copied.block_bytes[0] < 0.55 * 0.6 * found["lora-copied"].block_bytes[0]
