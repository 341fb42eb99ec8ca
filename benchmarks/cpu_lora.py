"""Time of a LoRA layer on a CPU: vLLM's kernels, Graft's, and the layer without LoRA.

    python -m benchmarks.cpu_lora [--quick]

The layer is SmolLM2-135M's `gate_up_proj` (576 to 2 x 1536, float32) with adapters of rank 16. Each round times the
three in turn, so that other work on the machine touches all alike. In the same run each result is compared with a
float64 loop over the rows: a kernel that is fast and wrong is reported as wrong.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from benchmarks.common import Report, arguments, interleave
from graft.serving.cpu_lora_kernels import GroupedPunicaWrapper

HIDDEN, SLICES, RANK, SLOTS = 576, (1536, 1536), 16, 4
ROUNDS = 30
TOLERANCE = 1e-4
"""Largest error, relative to the largest value, that float32 sums of 576 products may show."""
KERNELS = {
    "graft": "graft.serving.cpu_lora_kernels.GroupedPunicaWrapper",
    "stock": "vllm's PunicaWrapperCPU",
    "without LoRA": "the layer alone",
}
BATCHES = {
    "decode, 8 rows, base only": [-1] * 8,
    "decode, 8 rows, one adapter": [0] * 8,
    "decode, 8 rows, base and four adapters": [-1, 0, 1, 2, 3, -1, 0, 1],
    "prefill, 256 rows, base only": [-1] * 256,
    "prefill, 256 rows, one adapter": [0] * 256,
    "prefill, 256 rows, base and three adapters": [-1] * 64 + [0] * 64 + [1] * 64 + [3] * 64,
}
"""The slot of each row; -1 is the base model."""


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


def measure(report: Report, batch: str, slots: list[int], rounds: int) -> None:
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

    wrappers = {"graft": wrapper(GroupedPunicaWrapper, slots), "stock": wrapper(PunicaWrapperCPU, slots)}
    layers: dict[str, Callable[[], torch.Tensor]] = {
        **{name: partial(layer, lora) for name, lora in wrappers.items()},
        "without LoRA": partial(layer, None),
    }
    exact = {name: reference(x, weight, a, b, slots) for name in wrappers}
    exact["without LoRA"] = reference(x, weight, a, b, [-1] * len(slots))
    errors = {
        name: float((run().double() - exact[name]).abs().max() / exact[name].abs().max())
        for name, run in layers.items()
    }
    microseconds: dict[str, list[float]] = defaultdict(list)
    warm_up = 3 * len(layers)  # the first ones fill caches
    for number, (_, name) in enumerate(interleave(list(layers), rounds + 3)):
        begun = time.perf_counter()
        layers[name]()
        if number >= warm_up:
            microseconds[name].append((time.perf_counter() - begun) * 1e6)
    report.compare(batch, "µs", microseconds, ours=["graft"])
    report.check(f"{batch}: Graft's kernels are right", errors["graft"] < TOLERANCE, f"error {errors['graft']:.1e}")
    if errors["stock"] >= TOLERANCE:
        report.notes.append(f"{batch}: vLLM's kernels are WRONG, error {errors['stock']:.1e}.")


def main() -> int:
    """Returns 1 if Graft's kernels were wrong anywhere."""
    asked = arguments(__doc__)
    report = Report(
        name="cpu_lora",
        quick=asked.quick,
        settings={
            "layer": {"hidden": HIDDEN, "outputs": list(SLICES), "rank": RANK, "slots": SLOTS, "dtype": "float32"},
            "threads": torch.get_num_threads(),
            "tolerance": TOLERANCE,
        },
        contestants=KERNELS,
    )
    with torch.inference_mode():
        for batch, slots in BATCHES.items():
            measure(report, batch, slots, 5 if asked.quick else ROUNDS)
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
