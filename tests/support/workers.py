"""Training workers as threads of this process, for tests of what they compute together."""

import threading
from collections.abc import Callable
from typing import TypeVar

import torch

from graft.training.objectives.objective import Group

T = TypeVar("T")


def together(count: int, work: Callable[[Group], T]) -> list[T]:
    """What each of `count` workers returns, by rank. They must not draw random numbers: threads share the generator."""
    barrier = threading.Barrier(count, timeout=60)
    tensors: dict[int, torch.Tensor] = {}
    returned: dict[int, T] = {}

    def worker(rank: int) -> None:
        def reduce(tensor: torch.Tensor) -> None:
            tensors[rank] = tensor.clone()
            barrier.wait()
            tensor.copy_(sum(tensors[other] for other in range(count)))
            barrier.wait()

        returned[rank] = work(Group(rank, count, reduce))

    threads = [threading.Thread(target=worker, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return [returned[rank] for rank in range(count)]
