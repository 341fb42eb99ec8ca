"""What a training worker imports, in a process of its own."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.integration

SCRIPT = """
import sys
import graft.training.worker
print([name for name in ("sklearn", "trl", "vllm", "mlflow") if name in sys.modules])
from transformers.utils import is_sklearn_available
import importlib.util
print(is_sklearn_available() == (importlib.util.find_spec("sklearn") is not None))
"""
LIGHT = """
import sys
import graft.training.run
print([name for name in ("torch", "transformers", "peft", "pandas", "pyarrow", "mlflow") if name in sys.modules])
"""


def _printed(script: str) -> list[str]:
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    ).stdout.splitlines()


def test_a_worker_imports_no_library_that_training_does_not_use() -> None:
    found, told_rightly = _printed(SCRIPT)
    assert found == "[]"
    assert told_rightly == "True"  # whoever asks for scikit-learn later gets the truth


def test_what_starts_and_polls_runs_is_light() -> None:
    assert _printed(LIGHT) == ["[]"]
