"""Every library that would call home is asked itself, in a process as bare as a user's, whether it would."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.integration

ASK = {
    "graft.orchestrator.main": """
import huggingface_hub.constants, ray, ray._common.usage.usage_lib
from mlflow.telemetry.client import get_telemetry_client
assert get_telemetry_client() is None, "MLflow"
assert not ray._common.usage.usage_lib.usage_stats_enabled(), "Ray"
assert huggingface_hub.constants.HF_HUB_OFFLINE, "the hub"
""",
    "graft.serving.main": """
import ray._common.usage.usage_lib
assert not ray._common.usage.usage_lib.usage_stats_enabled(), "Ray"
""",
    "graft.serving.processes": """
from pathlib import Path
graft.serving.processes.prepare_environment(Path("/nowhere"), threads=1)
import huggingface_hub.constants
from mlflow.telemetry.client import get_telemetry_client
from vllm.usage.usage_lib import is_usage_stats_enabled
assert get_telemetry_client() is None, "MLflow"
assert not is_usage_stats_enabled(), "vLLM"
assert huggingface_hub.constants.HF_HUB_OFFLINE, "the hub"
""",
}
"""What a process imports first, and what it then asks."""


@pytest.mark.parametrize("module", ASK)
def test_nothing_that_a_process_loads_calls_home(module: str) -> None:
    # Without what tells the libraries of a test or of a build machine: there they are quiet by themselves.
    environment = {name: os.environ[name] for name in ("PATH", "HOME", "PYTHONPATH") if name in os.environ}
    program = f"import {module}\n{ASK[module]}"
    asked = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=200
    )
    assert asked.returncode == 0, asked.stderr[-2000:]
