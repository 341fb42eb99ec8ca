"""A whole worker, without Ray, on a tiny llama: each method, held-out data, and stopping early."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from graft.data.split import Split
from graft.domain.errors import InvalidArgument
from graft.domain.jobs import LastLayers, Lora, LossOn, Method, OverLengthPolicy, Preference, ServedAs, Tuning
from graft.domain.resources import DatasetFormat
from graft.training.objectives.objective import ALONE
from graft.training.spec import Clock, RunSpec
from graft.training.worker import run_worker
from tests.support.tiny_llama import make_tiny_llama

Told = list[tuple[str, dict[str, Any]]]
Run = Callable[..., Told]

TEXTS = [{"text": f"{word} is what {word} does. " * 4} for word in ("red", "green", "blue", "one", "two", "three")]
PAIRS = [{"prompt": f"{n} is ", "completion": "even" if n % 2 == 0 else "odd"} for n in range(24)]
CHATS = [
    {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
    for row in PAIRS
]
PREFERENCES = [{"prompt": f"{n}? ", "chosen": "yes, of course", "rejected": "no"} for n in range(24)]
ROWS: dict[Method, tuple[DatasetFormat, list[dict[str, Any]]]] = {
    Method.SELF_SUPERVISED: (DatasetFormat.TEXT, TEXTS),
    Method.SUPERVISED: (DatasetFormat.PROMPT_COMPLETION, PAIRS),
    Method.INSTRUCTION: (DatasetFormat.MESSAGES, CHATS),
    Method.PREFERENCE: (DatasetFormat.PREFERENCE, PREFERENCES),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Run:
    def run(method: Method, rows: list[dict[str, Any]] | None = None, **changes: Any) -> Told:
        format, usual = ROWS[method]
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows or usual))
        spec = RunSpec(
            job_id="ft-1",
            attempt=1,
            base_model="tiny",
            base_model_path=str(base),
            base_model_digest="sha256:b",
            dataset_path=str(data),
            dataset_format=format,
            validation_path=None,
            validation_format=None,
            output_dir=str(tmp_path / "run"),
            total_steps=12,
            batch_size=8,
            learning_rate=5e-3,
            warmup_ratio=0.0,
            weight_decay=0.0,
            max_grad_norm=1.0,
            context_tokens=64,
            seed=0,
            num_workers=1,
            checkpoint_steps=100,
            over_length_policy=OverLengthPolicy.FAIL,
            lora=Lora(4, 8.0, 0.0, ("q_proj", "v_proj", "down_proj")),
            method=method,
            preference=Preference(0.2),
        )
        told: Told = []
        changed = replace(spec, **changes)
        run_worker(changed, lambda kind, data: told.append((kind, data)), ALONE, lambda: 1, Clock())
        return told

    return run


def _metrics(told: Told) -> list[dict[str, Any]]:
    return [data for kind, data in told if kind == "metrics"]


def _about(run_folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_folder / "adapter" / "graft.json").read_text())
    return found


@pytest.mark.parametrize("method", list(ROWS))
def test_each_method_lowers_its_loss_on_rows_that_it_has_not_seen(run: Run, method: Method) -> None:
    told = run(method, validation_fraction=0.3, eval_steps=1)
    metrics = _metrics(told)
    assert [item["step"] for item in metrics] == list(range(1, 13))
    assert metrics[-1]["loss"] < 0.95 * metrics[0]["loss"]
    assert metrics[-1]["validation_loss"] < metrics[0]["validation_loss"]
    kind, result = told[-1]
    assert (kind, result["message"]) == ("finished", "The last step is done.")
    assert result["validation_loss"] == metrics[-1]["validation_loss"]
    assert result["train_loss"] == metrics[-1]["loss"]


@pytest.mark.parametrize("tuning", [Tuning.FULL, Tuning.LAST_LAYERS])
@pytest.mark.parametrize("method", list(ROWS))
def test_each_method_trains_weights_of_the_base_itself_and_is_served_as_a_delta(
    run: Run, tmp_path: Path, method: Method, tuning: Tuning
) -> None:
    held_out = method is not Method.SUPERVISED  # without: what the delta costs is told on the training data
    told = run(
        method,
        tuning=tuning,
        lora=Lora(),
        last_layers=LastLayers(1),
        served_as=ServedAs.LOW_RANK_DELTA,
        delta_rank=8,
        validation_fraction=0.3 if held_out else 0.0,
        learning_rate=1e-3,
    )
    metrics, result = _metrics(told), told[-1][1]
    assert metrics[-1]["loss"] < 0.97 * metrics[0]["loss"]
    assert 0 < result["delta_retained_fraction"] <= 1
    assert abs(result["delta_loss_change"]) < metrics[0]["loss"]
    assert result.get("validation_loss") == (pytest.approx(metrics[-1]["validation_loss"]) if held_out else None)
    assert len(_about(tmp_path / "run")["probes"]) > 0


def test_self_supervised_learning_tells_the_perplexity_of_held_out_text(run: Run) -> None:
    told = run(Method.SELF_SUPERVISED, validation_fraction=0.3)
    last = _metrics(told)[-1]
    assert last["validation_perplexity"] == pytest.approx(math.exp(last["validation_loss"]))
    assert told[-1][1]["validation_perplexity"] == last["validation_perplexity"]


def test_preference_tells_accuracy_and_margin_of_both_kinds_of_pairs(run: Run, tmp_path: Path) -> None:
    told = run(Method.PREFERENCE, validation_fraction=0.3)
    names = ("accuracy", "margin", "chosen_reward", "rejected_reward")
    last = _metrics(told)[-1]
    assert {*names, *(f"validation_{name}" for name in names)} <= set(last)
    assert last["accuracy"] == last["validation_accuracy"] == 1.0
    assert told[-1][1]["train_margin"] == last["margin"] > 0
    assert any("reference" in data["message"] for kind, data in told if kind == "message")
    # The probes are answers that the model should come to say.
    yes = list(b"yes, of course")
    assert all(len(probe["completion_token_ids"]) == len(yes) + 1 for probe in _about(tmp_path / "run")["probes"])


def test_loss_on_all_learns_prompts_too(run: Run) -> None:
    completion, everything = (
        _metrics(run(Method.SUPERVISED, loss_on=loss_on, total_steps=1))[0]["loss"] for loss_on in LossOn
    )
    assert completion != pytest.approx(everything, rel=1e-3)


@pytest.mark.parametrize(("eval_steps", "measured"), [(0, [3, 6, 7]), (2, [2, 4, 6, 7]), (7, [7]), (100, [7])])
def test_held_out_loss_is_measured_each_epoch_or_each_so_many_steps_and_at_the_end(
    run: Run, tmp_path: Path, eval_steps: int, measured: list[int]
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": "100 is ", "completion": "even"}))
    told = run(
        Method.SUPERVISED,
        validation_path=str(other),
        validation_format=DatasetFormat.PROMPT_COMPLETION,
        total_steps=7,
        eval_steps=eval_steps,
    )
    assert [item["step"] for item in _metrics(told) if "validation_loss" in item] == measured


def _contrary(held_out: bool) -> str:
    """What a row says: the held-out ones contradict the others, so that training can only make them worse."""
    return "aaaa" if held_out else "bbbb"


def _contradicting() -> list[dict[str, Any]]:
    rows = []
    for number in range(400):
        for held_out in (True, False):
            row = {"prompt": f"{number} ", "completion": _contrary(held_out)}
            if Split(0.3, held_out).takes(row):
                rows.append(row)
    return rows[:60]


def test_training_stops_when_held_out_loss_rises_and_keeps_the_best_weights(run: Run, tmp_path: Path) -> None:
    options = {"total_steps": 60, "eval_steps": 1, "validation_fraction": 0.3}
    told = run(Method.SUPERVISED, _contradicting(), early_stopping_patience=3, **options)
    metrics, result = _metrics(told), told[-1][1]
    curve = {item["step"]: item["validation_loss"] for item in metrics}
    best = min(curve, key=lambda step: curve[step])
    assert result["best_step"] == best
    assert result["best_validation_loss"] == result["validation_loss"] == curve[best]
    assert len(metrics) == best + 3 < 60
    assert result["message"].startswith(f"Stopped early at step {best + 3} of 60, best at step {best}: ")
    assert metrics[-1]["remaining_seconds"] == 0.0
    assert metrics[-1]["total_steps"] == 60
    assert metrics[-2]["remaining_seconds"] > 0

    # Probes are held-out rows: the kept weights say them more likely than those that trained to the end.
    kept = _about(tmp_path / "run")["probes"]
    told = run(Method.SUPERVISED, _contradicting(), **options)
    assert len(_metrics(told)) == 60
    assert "best_step" not in told[-1][1]
    losses = [-sum(probe["mean_logprob"] for probe in probes) for probes in (kept, _about(tmp_path / "run")["probes"])]
    assert losses[0] < losses[1]


def test_the_kept_weights_are_those_of_the_best_step(run: Run, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    told = run(
        Method.SUPERVISED,
        _contradicting(),
        total_steps=60,
        eval_steps=1,
        validation_fraction=0.3,
        early_stopping_patience=2,
        checkpoint_steps=1,
    )
    best = int(told[-1][1]["best_step"])
    kept = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    checkpoints = tmp_path / "run" / "checkpoints"

    def same(step: int) -> bool:
        other = load_file(checkpoints / f"step-{step}" / "adapter_model.safetensors")
        return all(bool((kept[name] == other[name]).all()) for name in kept)

    assert same(best)
    assert not same(best + 1)
    stored = [data for kind, data in told if kind == "checkpoint"]
    assert all("validation_loss" in data["metrics"] for data in stored)


def test_patience_that_is_never_used_up_lets_training_end(run: Run) -> None:
    told = run(Method.SUPERVISED, validation_fraction=0.3, eval_steps=3, early_stopping_patience=10)
    assert len(_metrics(told)) == 12
    assert told[-1][1]["message"].startswith("The last step is done, best at step ")
    assert {"best_step", "best_validation_loss"} <= set(told[-1][1])


def test_a_share_that_holds_out_nothing_is_refused(run: Run) -> None:
    with pytest.raises(InvalidArgument, match="No row is held out"):
        run(Method.SUPERVISED, PAIRS[:2], validation_fraction=0.001)
