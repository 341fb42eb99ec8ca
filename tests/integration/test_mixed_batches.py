"""Base and adapters in one batch of a real engine, every slot filled: Graft's kernels hold, vLLM's own do not."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from graft.serving.cpu_lora import STOCK, WRAPPER

from ..support.adapters import TARGETS
from ..support.mixed_batches import PROMPTS
from ..support.tiny_llama import make_tiny_llama
from ..support.tiny_models import make_tiny_model

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
BASE_SPEAKER = 0
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
Models: TypeAlias = dict[int, Path]
"""Folders: the base (0) and its adapters."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Models]:
    """By architecture."""
    made = {}
    for kind in ARCHITECTURES:
        folder = tmp_path_factory.mktemp(kind)
        base = make_tiny_llama(folder / "base") if kind == "llama" else make_tiny_model(folder / "base", kind)
        made[kind] = with_adapters(base, folder)
    return made


@pytest.fixture(scope="module")
def grouped(models: dict[str, Models]) -> dict[str, dict[str, Any]]:
    """What each architecture answers by Graft's kernels."""
    return dict(zip(models, run_engines(list(models.values()), "graft_cpu_lora"), strict=True))


def with_adapters(base: Path, folder: Path) -> Models:
    """The base (0) and two adapters of different rank that PEFT itself made."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    made = {BASE_SPEAKER: base}
    for speaker, rank in ((1, 8), (2, 4)):
        torch.manual_seed(speaker)
        config = LoraConfig(r=rank, lora_alpha=4 * rank, target_modules=list(TARGETS), init_lora_weights=False)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        get_peft_model(model, config).save_pretrained(folder / f"adapter-{speaker}")
        made[speaker] = folder / f"adapter-{speaker}"
    return made


def run_engines(models: list[Models], plugins: str) -> list[dict[str, Any]]:
    """What `tests.support.mixed_batches` prints with the plugins that VLLM_PLUGINS names."""
    environment = os.environ | {
        "VLLM_PLUGINS": plugins,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    each = [os.pathsep.join(map(str, one.values())) for one in models]
    command = [sys.executable, "-m", "tests.support.mixed_batches", *each]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    printed: list[dict[str, Any]] = json.loads(ended.stdout.splitlines()[-1])
    return printed


def each_answers_as_peft_does(models: Models, alone: dict[str, Any]) -> None:
    """Greedy tokens and their log-probabilities are those of transformers and PEFT."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    answers = {key: tuple(answer["token_ids"]) for key, answer in alone.items()}
    assert len(set(answers.values())) == len(answers), "speakers that answer alike would hide a mix-up"
    for speaker, path in models.items():
        model = AutoModelForCausalLM.from_pretrained(models[BASE_SPEAKER], dtype=torch.float32)
        if speaker != BASE_SPEAKER:
            model = PeftModel.from_pretrained(model, path)
        for key in (key for key in alone if speakers({key}) == {speaker}):
            prompt, answer = alone[key]["prompt_token_ids"], alone[key]["token_ids"]
            with torch.inference_mode():
                logprobs_TV = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            steps = logprobs_TV[len(prompt) - 1 : -1]
            assert steps.argmax(-1).tolist() == answer, key
            expected = steps.gather(1, torch.tensor(answer)[:, None])[:, 0].tolist()
            assert alone[key]["logprobs"] == pytest.approx(expected, abs=1e-3), key


def wrong(result: dict[str, Any]) -> set[str]:
    """Answers, as `speaker/prompt`, that a mixed batch changed: a token, or a log-probability by more than 1e-4."""
    changed = set()
    for mixed in result["mixed"]:
        assert mixed.keys() == result["alone"].keys()
        for key, answer in mixed.items():
            expected = result["alone"][key]
            if answer["token_ids"] != expected["token_ids"] or answer["logprobs"] != pytest.approx(
                expected["logprobs"], abs=1e-4
            ):
                changed.add(key)
    return changed


def speakers(keys: set[str]) -> set[int]:
    return {int(key.split("/")[0]) for key in keys}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_answers_in_a_mixed_batch_are_those_given_alone(kind: str, grouped: dict[str, dict[str, Any]]) -> None:
    assert grouped[kind]["wrapper"] == WRAPPER
    assert wrong(grouped[kind]) == set()


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_log_probabilities_of_prompts_in_a_mixed_batch_are_those_given_alone(
    kind: str, grouped: dict[str, dict[str, Any]]
) -> None:
    result = grouped[kind]
    assert result["prompts_mixed"].keys() == result["prompts_alone"].keys()
    for key, logprobs in result["prompts_mixed"].items():
        assert logprobs == pytest.approx(result["prompts_alone"][key], abs=1e-4), key


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_each_speaker_answers_as_peft_computes_it(
    kind: str, grouped: dict[str, dict[str, Any]], models: dict[str, Models]
) -> None:
    each_answers_as_peft_does(models[kind], grouped[kind]["alone"])


def test_the_stock_kernels_fail_this_check_for_every_base_answer_and_no_other(models: dict[str, Models]) -> None:
    (result,) = run_engines([models["llama"]], "")
    assert result["wrapper"] == STOCK
    assert wrong(result) == {f"{BASE_SPEAKER}/{prompt}" for prompt in range(len(PROMPTS))}
