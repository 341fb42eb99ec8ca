"""What healing tells when it fails. That it heals is shown in tests/integration/test_derived_base.py."""

import pytest
from safetensors import SafetensorError

from graft.domain.errors import FailedPrecondition
from graft.training.healing import Order, failed


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
