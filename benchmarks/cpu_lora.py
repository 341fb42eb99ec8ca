"""Time of a LoRA layer on a CPU: vLLM's kernels, Graft's, and the layer without LoRA, side by side in one run.

    .venv/bin/python benchmarks/cpu_lora.py

The layer is SmolLM2-135M's `gate_up_proj` (576 to 2 x 1536, float32) with adapters of rank 16. Each repeat times the
three in turn, so that other work on the machine touches all alike; medians and quartiles are written. In the same run
each result is compared with a float64 loop over the rows: a kernel that is fast and wrong is reported as wrong.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from graft.serving.cpu_lora_kernels import GroupedPunicaWrapper

HIDDEN, SLICES, RANK, SLOTS = 576, (1536, 1536), 16, 4
REPEATS = 30
TOLERANCE = 1e-4
"""Largest error, relative to the largest value, that float32 sums of 576 products may show."""
RESULT = Path(__file__).parent / "results" / "cpu_lora.json"


def batches() -> dict[str, list[int]]:
    """The slot of each row; -1 is the base model."""
    return {
        "decode, 8 rows, base only": [-1] * 8,
        "decode, 8 rows, one adapter": [0] * 8,
        "decode, 8 rows, base and four adapters": [-1, 0, 1, 2, 3, -1, 0, 1],
        "prefill, 256 rows, base only": [-1] * 256,
        "prefill, 256 rows, one adapter": [0] * 256,
        "prefill, 256 rows, base and three adapters": [-1] * 64 + [0] * 64 + [1] * 64 + [3] * 64,
    }


def wrapper(kind: type[Any], slots: list[int]) -> Any:
    """A wrapper that knows the batch, as vLLM's model runner tells it (always as a prefill)."""
    made = kind(len(slots), len(slots), "cpu")
    ids = tuple(slot + 1 for slot in slots)
    made.update_metadata(LoRAMapping(ids, ids, is_prefill=True), list(range(1, SLOTS + 1)), SLOTS, HIDDEN)
    return made


def reference(x: torch.Tensor, weight: torch.Tensor, a: Any, b: Any, slots: list[int]) -> torch.Tensor:
    """The layer row by row in float64."""
    y = x.double() @ weight.double().t()
    for row, slot in enumerate(slots):
        if slot >= 0:
            parts = zip(a, b, strict=True)
            y[row] += torch.cat([q[slot, 0].double() @ (p[slot, 0].double() @ x[row].double()) for p, q in parts])
    return y


def measure(slots: list[int]) -> dict[str, Any]:
    """Microseconds of the layer by kernel, and whether its result was right."""
    torch.manual_seed(0)
    weight = torch.randn(sum(SLICES), HIDDEN) / HIDDEN**0.5
    a = tuple(torch.randn(SLOTS, 1, RANK, HIDDEN) / HIDDEN**0.5 for _ in SLICES)
    b = tuple(torch.randn(SLOTS, 1, width, RANK) / RANK**0.5 for width in SLICES)
    x = torch.randn(len(slots), HIDDEN)

    def layer(lora: Any) -> torch.Tensor:
        y = torch.nn.functional.linear(x, weight)
        if lora is not None:
            lora.add_lora_linear(y, x, a, b, 1.0, SLICES)
        return y

    wrappers = {"stock": wrapper(PunicaWrapperCPU, slots), "graft": wrapper(GroupedPunicaWrapper, slots)}
    layers: dict[str, Callable[[], torch.Tensor]] = {
        "without LoRA": lambda: layer(None),
        **{name: lambda lora=lora: layer(lora) for name, lora in wrappers.items()},
    }
    exact = {name: reference(x, weight, a, b, slots) for name in wrappers}
    exact["without LoRA"] = reference(x, weight, a, b, [-1] * len(slots))
    errors = {
        name: float((run().double() - exact[name]).abs().max() / exact[name].abs().max())
        for name, run in layers.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    for repeat in range(REPEATS + 3):
        for name, run in layers.items():
            begun = time.perf_counter()
            run()
            if repeat >= 3:  # the first ones fill caches
                seconds[name].append(time.perf_counter() - begun)
    result = {}
    for name, taken in seconds.items():
        low, middle, high = (round(value * 1e6, 1) for value in statistics.quantiles(taken, n=4))
        result[name] = {
            "median_microseconds": middle,
            "quartiles_microseconds": [low, high],
            "relative_error": errors[name],
            "right": errors[name] < TOLERANCE,
        }
    return result


def main() -> int:
    """Measures, prints and writes. Returns 1 if Graft's kernels were wrong anywhere."""
    with torch.inference_mode():
        results = {name: measure(slots) for name, slots in batches().items()}
    cpu = next(
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    )
    report = {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": cpu, "threads": torch.get_num_threads(), "isa": torch.backends.cpu.get_cpu_capability()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "layer": {"hidden": HIDDEN, "outputs": list(SLICES), "rank": RANK, "slots": SLOTS, "dtype": "float32"},
        "repeats": REPEATS,
        "batches": results,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(report, indent=2) + "\n")
    for batch, kernels in results.items():
        line = ", ".join(
            f"{name} {entry['median_microseconds']:.0f} us{'' if entry['right'] else ' WRONG'}"
            for name, entry in kernels.items()
        )
        print(f"{batch}: {line}")
    return 0 if all(kernels["graft"]["right"] for kernels in results.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
