"""Every method with every choice of what changes, by the worker that trains them, one after another in one process.

Combinations that the end-to-end tests run through the public doors (`tests/support/method_jobs.py`) are left out.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.domain.jobs import LastLayers, Lora, Method, OverLengthPolicy, Preference, ServedAs, Tuning
from graft.domain.resources import DatasetFormat
from graft.training.objectives.objective import ALONE
from graft.training.spec import Clock, RunSpec
from graft.training.worker import run_worker
from tests.support.tiny_llama import make_tiny_llama

pytestmark = pytest.mark.integration

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
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(("method", "choice"), MATRIX)
def test_the_loss_falls_and_what_is_left_loads_in_plain_peft_and_answers(
    method: Method, choice: str, base: Path, tmp_path: Path
) -> None:
    format, rows = ROWS[method]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    mine: dict[str, Any] = {"lora": Lora(), **CHOICES[choice]}
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
        total_steps=10,
        batch_size=8,
        learning_rate=3e-3,
        warmup_ratio=0.0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        context_tokens=64,
        seed=0,
        num_workers=1,
        checkpoint_steps=100,
        over_length_policy=OverLengthPolicy.FAIL,
        method=method,
        preference=Preference(0.2),
        delta_rank=32,
        **mine,
    )
    told: list[tuple[str, dict[str, Any]]] = []
    run_worker(spec, lambda kind, data: told.append((kind, data)), ALONE, lambda: 1, Clock())
    losses = [data["loss"] for kind, data in told if kind == "metrics"]
    assert losses[-1] < 0.97 * losses[0]
    assert told[-1][0] == "finished"
    run = Path(spec.output_dir)
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
