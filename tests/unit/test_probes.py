"""How the stack tells that a process is ready."""

import os
import subprocess
import sys
from pathlib import Path

from graft.stack.processes import pid_file_probe


def test_a_pid_file_counts_only_while_its_process_lives(tmp_path: Path) -> None:
    file = tmp_path / "orchestrator.pid"
    ready = pid_file_probe(file)
    assert not ready()
    file.write_text(str(os.getpid()))
    assert ready()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    file.write_text(str(ended.pid))
    assert not ready()
    file.write_text("")  # seen while it is being written
    assert not ready()
