"""Memory of processes, from `/proc`. Knows nothing of what they do."""

from pathlib import Path

import psutil


def pss_bytes(pid: int) -> int:
    """Proportional set size of one process (proc(5), `smaps_rollup`): shared pages are divided among those that share
    them. 0 once it is gone."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0  # a zombie has no memory


def tree_bytes(pid: int) -> int:
    """Summed proportional set size of a process and all its descendants; 0 once it is gone."""
    try:
        process = psutil.Process(pid)
        return sum(pss_bytes(one.pid) for one in [process, *process.children(recursive=True)])
    except psutil.NoSuchProcess:
        return 0
