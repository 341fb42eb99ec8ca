"""LoRA's CPU kernels, against a plain loop over rows; vLLM's own fail the same check."""

import random
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

SLOTS, RANK, WIDTH, SLICES = 3, 4, 16, (8, 4, 4)
IDS = [11, 12, 13]


@pytest.fixture(scope="module")
def wrappers() -> dict[str, Any]:
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    from graft.serving.cpu_lora_kernels import GroupedPunicaWrapper

    return {"stock": PunicaWrapperCPU, "grouped": GroupedPunicaWrapper}


def _wrapper(kind: Any, slots: list[int], *, prefill: bool) -> Any:
    from vllm.lora.layers import LoRAMapping

    wrapper = kind(256, 64, "cpu")
    ids = tuple(IDS[slot] if slot >= 0 else 0 for slot in slots)
    wrapper.update_metadata(LoRAMapping(ids, ids, is_prefill=prefill), list(IDS), SLOTS, 100)
    return wrapper


def _stacks(dtype: torch.dtype, seed: int) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(seed)
    made = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    a = tuple(made(SLOTS, 1, RANK, WIDTH) for _ in SLICES)
    b = tuple(made(SLOTS, 1, width, RANK) for width in SLICES)
    return a, b


def _by_row(y: torch.Tensor, x: torch.Tensor, a: Any, b: Any, scale: float, slots: list[int]) -> torch.Tensor:
    expected = y.clone().double()
    for row, slot in enumerate(slots):
        if slot < 0:
            continue
        offset = 0
        for a_part, b_part, width in zip(a, b, SLICES, strict=True):
            delta = b_part[slot, 0].double() @ (a_part[slot, 0].double() @ x[row].double())
            expected[row, offset : offset + width] += scale * delta
            offset += width
    return expected


def _error(wrapper: Any, slots: list[int], dtype: torch.dtype, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(len(slots), WIDTH, generator=generator).to(dtype)
    y = torch.randn(len(slots), sum(SLICES), generator=generator).to(dtype)
    a, b = _stacks(dtype, seed)
    expected = _by_row(y, x, a, b, 0.5, slots)
    wrapper.add_lora_linear(y, x, a, b, 0.5, SLICES)
    return float((y.double() - expected).abs().max() / expected.abs().max())


def _mixtures(count: int) -> list[list[int]]:
    rng = random.Random(0)
    fixed = [[-1], [0], [-1, 0, 1, 2], [2, 2, 2], [0, 1, 0, 1], [-1, -1], [0, 0, -1, 2, 2]]
    return fixed + [[rng.randint(-1, SLOTS - 1) for _ in range(rng.randint(1, 40))] for _ in range(count)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("prefill", [True, False])
def test_every_mixture_of_rows_equals_the_plain_loop(
    wrappers: dict[str, Any], dtype: torch.dtype, tolerance: float, prefill: bool
) -> None:
    for seed, slots in enumerate(_mixtures(60)):
        wrapper = _wrapper(wrappers["grouped"], slots, prefill=prefill)
        assert _error(wrapper, slots, dtype, seed) < tolerance, slots


@pytest.mark.parametrize("prefill", [True, False])
def test_the_stock_kernels_fail_this_check_for_rows_without_an_adapter(wrappers: dict[str, Any], prefill: bool) -> None:
    assert _error(_wrapper(wrappers["stock"], [0, 1, 2], prefill=prefill), [0, 1, 2], torch.float32, 0) < 1e-5
    assert _error(_wrapper(wrappers["stock"], [-1, 0, 1], prefill=prefill), [-1, 0, 1], torch.float32, 0) > 0.1
    assert _error(_wrapper(wrappers["grouped"], [-1, 0, 1], prefill=prefill), [-1, 0, 1], torch.float32, 0) < 1e-5


def test_shrink_then_expand_is_the_linear_in_two_steps(wrappers: dict[str, Any]) -> None:
    slots = [0, -1, 2, 0]
    wrapper = _wrapper(wrappers["grouped"], slots, prefill=True)
    a, b = _stacks(torch.float32, 5)
    x = torch.randn(len(slots), WIDTH)
    y = torch.randn(len(slots), sum(SLICES))
    expected = _by_row(y, x, a, b, 2.0, slots)
    middle = torch.full((len(SLICES), len(slots), RANK), 7.0)
    wrapper.add_shrink(middle, x, a, 2.0)
    wrapper.add_expand(y, middle, b, SLICES)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)


def test_logits_and_embeddings_leave_rows_without_an_adapter_alone(wrappers: dict[str, Any]) -> None:
    slots = [2, -1, 0]
    wrapper = _wrapper(wrappers["grouped"], slots, prefill=False)
    a, b = torch.randn(SLOTS, 1, RANK, WIDTH), torch.randn(SLOTS, 1, 9, RANK)
    x, y = torch.randn(3, WIDTH), torch.randn(3, 9)
    expected = y.clone()
    for row, slot in enumerate(slots):
        if slot >= 0:
            expected[row] += b[slot, 0] @ (a[slot, 0] @ x[row]) * 0.5
    wrapper.add_lora_logits(y, x, a, b, 0.5)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    shrunk, y = torch.randn(3, RANK), torch.randn(3, 9)
    expected = torch.stack([y[0] + b[2, 0] @ shrunk[0], y[1], y[2] + b[0, 0] @ shrunk[2]])
    wrapper.add_lora_embedding(y, shrunk, b)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_logits_of_a_prompt_pass_where_no_adapter_changes_the_head_and_are_refused_elsewhere(
    wrappers: dict[str, Any],
) -> None:
    wrapper = _wrapper(wrappers["grouped"], [0, -1, 0, -1, 0], prefill=True)
    a, b = torch.randn(SLOTS, 1, RANK, WIDTH), torch.zeros(SLOTS, 1, 9, RANK)
    for prompt_rows in (2, 30):
        y = torch.randn(prompt_rows, 9)
        expected = y.clone()
        wrapper.add_lora_logits(y, torch.randn(prompt_rows, WIDTH), a, b, 1.0)
        assert torch.equal(y, expected)
        with pytest.raises(NotImplementedError, match="lm_head"):
            wrapper.add_lora_logits(y, torch.randn(prompt_rows, WIDTH), a, b + 1, 1.0)


@pytest.mark.parametrize(
    ("slots", "expected"),
    [([-1] * 6, []), ([1] * 6, ["mm", "addmm_"] * len(SLICES))],
    ids=["no adapter", "one adapter for all rows"],
)
def test_a_batch_without_adapters_costs_nothing_and_one_adapter_copies_no_rows(
    wrappers: dict[str, Any], slots: list[int], expected: list[str]
) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        views = ("slice", "select", "t", "view")

        def __init__(self) -> None:
            super().__init__()
            self.called: list[str] = []

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = function.overloadpacket.__name__
            self.called += [] if name in self.views else [name]
            return function(*args, **(kwargs or {}))

    a, b = _stacks(torch.float32, 0)
    x, y = torch.randn(len(slots), WIDTH), torch.zeros(len(slots), sum(SLICES))
    wrapper = _wrapper(wrappers["grouped"], slots, prefill=True)
    with Recorder() as recorder:
        wrapper.add_lora_linear(y, x, a, b, 1.0, SLICES)
    assert recorder.called == expected


@pytest.mark.parametrize(
    ("hidden", "weights"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str
)
def test_adapters_of_another_type_than_the_model_are_computed_too(
    wrappers: dict[str, Any], hidden: torch.dtype, weights: torch.dtype
) -> None:
    for slots in ([0, 0], [0, -1, 0, 2]):
        wrapper = _wrapper(wrappers["grouped"], slots, prefill=True)
        a, b = _stacks(weights, 3)
        x, y = torch.randn(len(slots), WIDTH).to(hidden), torch.randn(len(slots), sum(SLICES)).to(hidden)
        expected = _by_row(y, x, a, b, 0.5, slots)
        wrapper.add_lora_linear(y, x, a, b, 0.5, SLICES)
        torch.testing.assert_close(y.double(), expected, rtol=5e-2, atol=2e-1)


def test_the_plugin_is_what_vllm_loads_and_refuses_a_platform_that_it_does_not_know(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from importlib.metadata import entry_points

    from vllm.platforms.cpu import CpuPlatform

    from graft.serving import cpu_lora

    (plugin,) = entry_points(group="vllm.general_plugins", name="graft_cpu_lora")
    monkeypatch.setattr(CpuPlatform, "get_punica_wrapper", classmethod(lambda _: cpu_lora.STOCK))
    for _ in range(2):
        plugin.load()()
        assert CpuPlatform.get_punica_wrapper() == cpu_lora.WRAPPER
    monkeypatch.setattr(CpuPlatform, "get_punica_wrapper", classmethod(lambda _: "another.Wrapper"))
    with pytest.raises(RuntimeError, match=r"another\.Wrapper"):
        cpu_lora.register()
