"""Every method with every choice of what changes, one after another in one warm group of two of Ray Train's workers.

Combinations that the end-to-end tests run through the public doors (`tests/support/method_jobs.py`) are left out.
"""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.domain.jobs import LastLayers, Lora, Method, OverLengthPolicy, Preference, ServedAs, Tuning
from graft.domain.resources import DatasetFormat
from graft.training.spec import RunSpec
from tests.support.matrix_workers import TOLD, work_through
from tests.support.tiny_llama import make_tiny_llama

# The first test waits for all of them.
pytestmark = [pytest.mark.integration, pytest.mark.ray, pytest.mark.timeout(400)]
WORKERS = 2

PAIRS = [{"prompt": f"{n} is ", "completion": "even" if n % 2 == 0 else "odd"} for n in range(24)]
ROWS: dict[Method, tuple[DatasetFormat, list[dict[str, Any]]]] = {
    Method.SELF_SUPERVISED: (
        DatasetFormat.TEXT,
        [{"text": f"{word} is what {word} does. " * 4} for word in ("red", "green", "blue", "one", "two", "three")],
    ),
    Method.SUPERVISED: (DatasetFormat.PROMPT_COMPLETION, PAIRS),
    Method.INSTRUCTION: (DatasetFormat.QUESTION_ANSWER, [{"question": f"{n}?", "answer": str(n)} for n in range(24)]),
    Method.PREFERENCE: (
        DatasetFormat.PREFERENCE,
        [{"prompt": f"{n}? ", "chosen": "yes, of course", "rejected": "no"} for n in range(24)],
    ),
}
PLAIN = Lora(4, 8.0, 0.0, ("q_proj", "v_proj", "down_proj"))
CHOICES: dict[str, dict[str, Any]] = {
    "lora": {"lora": PLAIN},
    "rslora": {"lora": replace(PLAIN, use_rslora=True)},
    "dora": {"lora": replace(PLAIN, use_dora=True), "served_as": ServedAs.LOW_RANK_DELTA},
    "head": {"lora": replace(PLAIN, modules_to_save=("lm_head",)), "served_as": ServedAs.LOW_RANK_DELTA},
    "last": {"tuning": Tuning.LAST_LAYERS, "last_layers": LastLayers(1), "served_as": ServedAs.LOW_RANK_DELTA},
    "full": {"tuning": Tuning.FULL, "served_as": ServedAs.LOW_RANK_DELTA},
}
THROUGH_THE_DOORS = {
    (Method.SUPERVISED, "lora"),
    (Method.SELF_SUPERVISED, "rslora"),
    (Method.SUPERVISED, "dora"),
    (Method.INSTRUCTION, "head"),
    (Method.PREFERENCE, "lora"),
    (Method.SUPERVISED, "last"),
    (Method.SUPERVISED, "full"),
}
MATRIX = [(method, choice) for method in ROWS for choice in CHOICES if (method, choice) not in THROUGH_THE_DOORS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("matrix")


@pytest.fixture(scope="module")
def base(folder: Path) -> Path:
    return make_tiny_llama(folder / "tiny")


@pytest.fixture(scope="module")
def specs(folder: Path, base: Path) -> dict[tuple[Method, str], RunSpec]:
    """Each as it was trained: what it was told lies in its folder."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    specs = {(method, choice): _spec(method, choice, base, folder) for method, choice in MATRIX}
    ray.init(num_cpus=WORKERS, object_store_memory=100 * 2**20, log_to_driver=False, include_dashboard=False)
    try:
        TorchTrainer(
            work_through,
            train_loop_config={"specs": list(specs.values())},
            scaling_config=ScalingConfig(num_workers=WORKERS),
            run_config=RunConfig(name="matrix", storage_path=str(folder / "ray-train")),
            torch_config=TorchConfig(backend="gloo"),
        ).fit()
    finally:
        ray.shutdown()
    return specs


def _spec(method: Method, choice: str, base: Path, folder: Path) -> RunSpec:
    format, rows = ROWS[method]
    mine = folder / f"{method}-{choice}"
    mine.mkdir()
    data = mine / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen: dict[str, Any] = {"lora": Lora(), **CHOICES[choice]}
    return RunSpec(
        job_id="ft-1",
        attempt=1,
        base_model="tiny",
        base_model_path=str(base),
        base_model_digest="sha256:b",
        dataset_path=str(data),
        dataset_format=format,
        validation_path=None,
        validation_format=None,
        output_dir=str(mine / "run"),
        total_steps=10,
        batch_size=8,
        learning_rate=3e-3,
        warmup_ratio=0.0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        context_tokens=64,
        seed=0,
        num_workers=WORKERS,
        checkpoint_steps=100,
        over_length_policy=OverLengthPolicy.FAIL,
        method=method,
        preference=Preference(0.2),
        delta_rank=32,
        **chosen,
    )


@pytest.mark.parametrize(("method", "choice"), MATRIX)
def test_the_loss_falls_and_what_is_left_loads_in_plain_peft_and_answers(
    method: Method, choice: str, specs: dict[tuple[Method, str], RunSpec], base: Path
) -> None:
    spec = specs[method, choice]
    run = Path(spec.output_dir)
    told = [json.loads(line) for line in (run.parent / TOLD).read_text().splitlines()]
    assert told[-1][0] == "finished", told[-1]
    losses = [data["loss"] for kind, data in told if kind == "metrics"]
    assert losses[-1] < 0.97 * losses[0]
    _proves_and_answers(base, run / "adapter")
    if spec.tuning is not Tuning.LORA:
        _proves_and_answers(run / "model", None)


def _proves_and_answers(base: Path, adapter: Path | None) -> None:
    """Loads with plain libraries what a run has left: it scores the probes as the run did, and generates."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    model.eval()
    probes = json.loads(((adapter or base) / "graft.json").read_text())["probes"]
    assert probes
    for probe in probes:
        prompt, completion = probe["prompt_token_ids"], probe["completion_token_ids"]
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        scored = [float(logprobs[len(prompt) + place - 1, token]) for place, token in enumerate(completion)]
        assert sum(scored) / len(scored) == pytest.approx(probe["mean_logprob"], abs=1e-3)
    tokenizer = AutoTokenizer.from_pretrained(base)
    asked = torch.tensor([tokenizer("3?")["input_ids"]])
    made = model.generate(input_ids=asked, max_new_tokens=6, do_sample=False)
    assert made.shape[1] > asked.shape[1]
