"""What healing measures, and what it tells when it fails. As a command: tests/integration/test_derived_base.py."""

import hashlib
import math
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from graft.data.raw_text import read_documents, sequences
from graft.domain.errors import FailedPrecondition
from graft.training.healing import MEASURED_SEQUENCES, SEQUENCE_TOKENS, Order, check_fits, derive, failed
from graft.training.objectives.supervised import mean_loss
from graft.training.packing import PACKED
from tests.support.tiny_llama import make_tiny_llama


def an_order(**given: object) -> Order:
    asked = {
        "base": "deep",
        "base_digest": "sha256:0",
        "base_folder": "/deep",
        "output": "/home/base_models/.derive-1",
        "layers": 2,
        "choose": "angle",
        "text": "",
        "tokens": 0,
        "seconds": 60.0,
    }
    return Order(**(asked | given))  # type: ignore[arg-type]


def test_the_perplexity_that_is_told_is_that_of_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_tiny_llama(tmp_path / "base", layers=3, initializer_range=0.2)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    text = tmp_path / "text.txt"
    text.write_text(
        "".join(f"Line {number}: the quick brown fox and its {number % 7} cubs.\n" for number in range(600))
    )
    output = tmp_path / "output"
    output.mkdir()
    lineage = derive(an_order(base_folder=str(base), output=str(output), text=str(text), tokens=2000))
    assert '"kind": "cut"' in capsys.readouterr().out
    assert lineage["text"] == "text.txt"
    assert lineage["text_digest"] == f"sha256:{hashlib.sha256(text.read_bytes()).hexdigest()}"
    tokenizer = AutoTokenizer.from_pretrained(output)
    _, held_out = sequences(read_documents(text), tokenizer, SEQUENCE_TOKENS, 2000, MEASURED_SEQUENCES)
    stored = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32, attn_implementation=PACKED)
    assert next(iter(load_file(output / "model.safetensors").values())).dtype is torch.bfloat16
    assert lineage["perplexity"]["after_healing"] == round(math.exp(mean_loss(stored, held_out)), 4)


def test_a_model_that_does_not_fit_is_refused_with_the_numbers_before_it_is_loaded(tmp_path: Path) -> None:
    base = make_tiny_llama(tmp_path / "base", layers=3)
    order = an_order(base_folder=str(base))
    check_fits(order, 10**9)
    with pytest.raises(FailedPrecondition, match=r"healing 2 layers of it .*AdamW.*there are 0\.001 GB") as caught:
        check_fits(order, 10**6)
    assert caught.value.reason == "DOES_NOT_FIT"


@pytest.mark.parametrize(
    ("error", "reason", "told"),
    [
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "DISK_FULL",
            "The disk of /home/base_models is full",
        ),
        (OSError(28, "No space left on device"), "DISK_FULL", "The disk of /home/base_models is full"),
        (MemoryError(), "OUT_OF_MEMORY", "Keep fewer --layers"),
        (FailedPrecondition("max_grad_norm", reason="LOSS_NOT_FINITE"), "LOSS_NOT_FINITE", "the weights of deep"),
        (ZeroDivisionError("x\ny"), "DERIVE_FAILED", "Deriving failed with ZeroDivisionError: x"),
    ],
)
def test_a_failure_is_told_in_the_words_of_the_command(error: Exception, reason: str, told: str) -> None:
    report = failed(error, an_order())
    assert report["reason"] == reason
    assert told in report["message"]
    assert not any(word in report["message"] for word in ("context_tokens", "max_grad_norm", "the job"))
