"""Jobs whose data is read at the same time, in a process that has imported nothing yet."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny_llama import make_tiny_llama

pytestmark = pytest.mark.integration

SCRIPT = """
import sys, threading
from datetime import UTC, datetime
from graft.domain.jobs import Job, JobSpec, JobState
from graft.domain.resources import BaseModel, Dataset, DatasetFormat
from graft.orchestrator.preparer import TokenizingPreparer, import_tokenizers

base_path, rows = sys.argv[1:3]
now = datetime.now(UTC)
base = BaseModel("tiny", base_path, "sha256:b", 1000, 1, 256, "MIT", "test", ("q_proj",), 64)
dataset = Dataset("ds", "default", "rows", DatasetFormat.PROMPT_COMPLETION, 2, 1, "sha256:d", rows, now)
job = Job("ft-1", "default", JobSpec("tiny", "ds"), JobState.VALIDATING, now, now)
if "--without-torch" in sys.argv:
    import_tokenizers()
together = threading.Barrier(6)
preparer = TokenizingPreparer()
counted = []

def work():
    together.wait()
    counted.append(preparer.prepare(job, base, dataset, None).training.example_count)

threads = [threading.Thread(target=work) for _ in range(together.parties)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(*counted, "torch" in sys.modules)
import torch
"""


@pytest.mark.parametrize(("option", "with_torch"), [([], "True"), (["--without-torch"], "False")])
def test_the_first_jobs_may_come_all_at_once(tmp_path: Path, option: list[str], with_torch: str) -> None:
    base = make_tiny_llama(tmp_path / "base")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"q{n}", "completion": "yes"}) + "\n" for n in range(2)))
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(base), str(rows), *option], capture_output=True, text=True, timeout=120
    )
    assert ended.stdout.split() == ["2"] * 6 + [with_torch], ended.stderr[-3000:]


BLOCKS = """
import sys
from datetime import UTC, datetime
from graft.domain.errors import InvalidArgument
from graft.domain.jobs import Job, JobSpec, JobState, LastLayers, Tuning
from graft.domain.resources import BaseModel, Dataset, DatasetFormat
from graft.orchestrator.preparer import TokenizingPreparer, import_tokenizers

base_path, rows = sys.argv[1:3]
now = datetime.now(UTC)
base = BaseModel("tiny", base_path, "sha256:b", 1000, 1, 256, "MIT", "test", ("q_proj",), 64)
dataset = Dataset("ds", "default", "rows", DatasetFormat.PROMPT_COMPLETION, 2, 1, "sha256:d", rows, now)
import_tokenizers()
for blocks in (2, 3):
    spec = JobSpec("tiny", "ds", tuning=Tuning.LAST_LAYERS, last_layers=LastLayers(blocks))
    job = Job("ft-1", "default", spec, JobState.VALIDATING, now, now)
    try:
        print(TokenizingPreparer().prepare(job, base, dataset, None).memory.total_bytes > 0, "torch" in sys.modules)
    except InvalidArgument as error:
        print(error.message)
"""


def test_the_memory_is_known_without_torch_and_more_blocks_than_there_are_are_refused(tmp_path: Path) -> None:
    base = make_tiny_llama(tmp_path / "base")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"q{n}", "completion": "yes"}) + "\n" for n in range(2)))
    ended = subprocess.run(
        [sys.executable, "-c", BLOCKS, str(base), str(rows)], capture_output=True, text=True, timeout=120
    )
    first, second = ended.stdout.splitlines()
    assert first == "True False", ended.stderr[-3000:]
    assert second.startswith("last_layers.blocks asks for the last 3 blocks, and tiny has 2.")
