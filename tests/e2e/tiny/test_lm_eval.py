"""lm-eval's own API models, unmodified, against Graft: the figures are those of the weights themselves."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.tiny_jobs import Trained
from tests.support.whole_stack import WholeStack

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed (extra lm-eval)"),
]

ROWS = [
    {"question": f"Is {number} even?", "choices": ["yes", "no", "who can tell"], "label": number % 2}
    for number in range(10)
]
TASKS: dict[str, dict[str, Any]] = {
    "tiny_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    },
    "tiny_answer": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[label]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "temperature": 0},
        "metric_list": [{"metric": "exact_match"}],
    },
    "tiny_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, task in TASKS.items():
        where = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}}, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **where, **task}))
    return folder


def lm_eval(stack: WholeStack, tasks: Path, out: Path, kind: str, task: str, *options: str, **model: object) -> Any:
    """Runs one task; returns its results and its samples, in the rows' order."""
    door = "chat/completions" if kind == "local-chat-completions" else "completions"
    arguments = {"base_url": f"http://127.0.0.1:{stack.settings.gateway.http_port}/v1/{door}", **model}
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "run", "--model", kind, "--tasks", task, "--include_path", str(tasks)),
            *("--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())),
            *("--output_path", str(out), "--log_samples", *options),
        ],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(out / "hf")},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    (results,) = out.rglob("results_*.json")
    (samples,) = out.rglob(f"samples_{task}_*.jsonl")
    rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    return json.loads(results.read_text())["results"][task], rows


def logprobs(model: Any, tokenizer: Any, context: str, continuation: str) -> tuple[float, bool]:
    """Of the continuation after the context, and whether it is what greedy decoding says."""
    before = tokenizer.encode(context, add_special_tokens=False)
    after = tokenizer.encode(continuation, add_special_tokens=False)
    with torch.no_grad():
        logits = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1].float()
    told = torch.log_softmax(logits, -1)[range(len(after)), after]
    return float(told.sum()), bool((logits.argmax(-1) == torch.tensor(after)).all())


@pytest.mark.parametrize(
    ("model", "options", "sending"),
    [
        ("tiny", ("--batch_size", "4"), {}),
        ("tiny:echo@1", (), {"num_concurrent": 4}),
        ("tiny:echo", (), {"tokenized_requests": False}),
    ],
    ids=["base, batches of token ids", "adapter, concurrent", "adapter, as text"],
)
def test_the_likelihoods_of_choices_are_those_of_the_weights(
    stack: WholeStack,
    trained: Trained,
    base_folder: Path,
    tasks: Path,
    tmp_path: Path,
    model: str,
    options: tuple[str, ...],
    sending: dict[str, object],
) -> None:
    asked = {"model": model, "tokenizer": base_folder, "tokenizer_backend": "huggingface", "max_length": 512}
    results, samples = lm_eval(stack, tasks, tmp_path, "local-completions", "tiny_choice", *options, **asked, **sending)
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    weights = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    if model != "tiny":
        (adapter,) = (stack.home / "runs" / trained.echo.id).rglob("adapter/adapter_config.json")
        weights = PeftModel.from_pretrained(weights, adapter.parent)
    right = 0
    for row, sample in zip(ROWS, samples, strict=True):
        expected = [logprobs(weights, tokenizer, str(row["question"]), f" {choice}") for choice in row["choices"]]
        for (told, greedy), (own, own_greedy) in zip(sample["filtered_resps"], expected, strict=True):
            assert float(told) == pytest.approx(own, abs=2e-3)
            assert str(greedy) == str(own_greedy)
        right += max(range(3), key=lambda index: expected[index][0]) == row["label"]
    assert results["acc,none"] == pytest.approx(right / len(ROWS))


def test_the_likelihood_of_a_whole_text_is_that_of_the_weights(
    stack: WholeStack, base_folder: Path, tasks: Path, tmp_path: Path
) -> None:
    asked = {"model": "tiny", "tokenizer": base_folder, "tokenizer_backend": "huggingface", "max_length": 512}
    results, _ = lm_eval(stack, tasks, tmp_path, "local-completions", "tiny_text", **asked)
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    weights = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    texts = [str(row["question"]) for row in ROWS]
    # lm-eval puts this before a text, for its first token to be predicted from something.
    total = sum(logprobs(weights, tokenizer, tokenizer.bos_token, text)[0] for text in texts)
    bits = -total / sum(len(text.encode()) for text in texts) / torch.log(torch.tensor(2.0)).item()
    assert results["bits_per_byte,none"] == pytest.approx(bits, rel=1e-3)


@pytest.mark.usefixtures("trained")
def test_chats_are_answered_as_they_are_to_anybody(
    stack: WholeStack, client: openai.OpenAI, tasks: Path, tmp_path: Path
) -> None:
    options = ("--apply_chat_template",)
    _, samples = lm_eval(
        stack, tasks, tmp_path, "local-chat-completions", "tiny_answer", *options, model="tiny:sums@1", num_concurrent=2
    )
    for row, sample in zip(ROWS, samples, strict=True):
        turns: Any = [{"role": "user", "content": row["question"]}]
        answer = client.chat.completions.create(
            model="tiny:sums@1", messages=turns, max_tokens=8, temperature=0, stop=["\n"]
        )
        assert sample["filtered_resps"] == [answer.choices[0].message.content]
