"""Memory of `graft datasets validate`, which must not grow with the file.

    python -m benchmarks.data_memory [--quick]

The command is run on files of generated rows, the largest ten times the smallest, written to a temporary folder one row
at a time. What is told is the peak of the resident memory of the command's process, as the kernel counts it. No base
model is there: no tokens are counted, and everything else is.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

from benchmarks.common import LEAST_ROUNDS, ROOT, Report, arguments, interleave, temporary_folder

MB = 10**6
SIZES_MB = (100, 1000)
QUICK_SIZES_MB = (5, 50)
PARAGRAPHS = 1000
PARAGRAPH_WORDS = 150
"""About a kilobyte; a row has two of them."""
NOISE_BYTES = 8 * MB
"""Two runs on one file differ by less. What is cached of the rows' hashes, which lie on disk, has 2 MB; in memory they
would take 10 MB more for 900 MB more, and sorting them 25."""


def write_rows(path: Path, size_bytes: int) -> int:
    """Rows of a prompt and a completion, each another, until the file has that size; how many they are."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 10))) for _ in range(5000)]
    paragraphs = [" ".join(draw.choices(words, k=PARAGRAPH_WORDS)) for _ in range(PARAGRAPHS)]
    count = 0
    with path.open("w", encoding="ascii") as file:
        while file.tell() < size_bytes:
            for _ in range(1000):
                row = {"prompt": f"{count}. {draw.choice(paragraphs)}", "completion": f" {draw.choice(paragraphs)}"}
                file.write(json.dumps(row) + "\n")
                count += 1
    return count


def validated(path: Path, home: Path) -> tuple[int, int]:
    """Peak of the resident memory in bytes, and the rows that the command tells of."""
    answer = home / "answer.json"
    with answer.open("wb") as told:
        process = subprocess.Popen(
            [sys.executable, "-m", "graft.cli.main", "datasets", "validate", str(path), "--json"],
            stdin=subprocess.DEVNULL,
            stdout=told,
            cwd=ROOT,
            env={**os.environ, "GRAFT_HOME": str(home), "GRAFT_CACHE": str(home / "cache")},
        )
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"graft datasets validate {path.name} ended with {process.returncode}: {answer.read_text()}")
    return used.ru_maxrss * 1024, int(json.loads(answer.read_text())["row_count"])


def main() -> int:
    """Exit code 1 when memory grew with the file."""
    quick = arguments(__doc__).quick
    sizes = {f"{size} MB": size * MB for size in (QUICK_SIZES_MB if quick else SIZES_MB)}
    rounds = 1 if quick else LEAST_ROUNDS
    settings = {"rounds": rounds, "noise_bytes_allowed": NOISE_BYTES}
    report = Report("data_memory", quick, settings, {name: f"JSONL of {size} bytes" for name, size in sizes.items()})
    with temporary_folder() as folder:
        files = {name: folder / f"{size}.jsonl" for name, size in sizes.items()}
        rows = {name: write_rows(files[name], size) for name, size in sizes.items()}
        peaks: dict[str, list[int]] = {name: [] for name in sizes}
        counted: dict[str, int] = {}
        for _, name in interleave(list(sizes), rounds):
            peak_bytes, counted[name] = validated(files[name], folder)
            peaks[name].append(peak_bytes)
    for name in sizes:
        report.figure("peak resident memory", "MB", name, [peak / MB for peak in peaks[name]])
    report.check("every row was read", counted == rows, counted)
    small, large = sizes
    grown = max(peaks[large]) - min(peaks[small])
    told = (
        f"{grown / MB:.1f} MB more for {(sizes[large] - sizes[small]) / MB:.0f} MB more; {NOISE_BYTES / MB:.1f} allowed"
    )
    report.check("memory does not grow with the file", grown <= NOISE_BYTES, told)
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
