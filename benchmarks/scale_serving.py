"""What `docs/scale.md` reckons with of serving: an engine's memory, loads, the path of a request, Serve's controller.

    python -m benchmarks.scale_serving [--quick]

One stack of the default settings, but for room for more adapters. Adapters of random weights are loaded by path, one
after the other; streamed chats tell what each process on their way costs in CPU; and replicas that do nothing, beside
the engine, tell what each costs Ray Serve's controller.
"""

import asyncio
import functools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from tests.support.adapters import make_adapter
from tests.support.serving_stack import adapter_ref, descendants, titles

from benchmarks.common import (
    Contestant,
    Report,
    Round,
    answer_rounds,
    arguments,
    base_model,
    console,
    temporary_folder,
)
from benchmarks.load import drive, fresh_seed, http_ask, questions
from benchmarks.measured import Measured, add
from benchmarks.stacks import Stack, graft_stack
from graft.internal.engine_client import EngineClient
from graft.internal.token import engine_token
from graft.process_memory import pss_bytes, tree_bytes
from graft.stack.processes import ray_environment

PARTS = {
    "replica": "the replica with its engine: SmolLM2-135M, default settings, max_cpu_loras as in `settings`",
    "gateway": "graft.gateway.main",
    "proxy": "Ray Serve's proxy",
    "controller": "Ray Serve's controller",
}
ON_THE_WAY = {"gateway": "graft.gateway.main", "proxy": "ray::ProxyActor", "replica": "ray::ServeReplica:graft-engine"}
"""Part of a process's command line. The engine's own process is no part of any of them."""
CONTROLLER = "ray::ServeController"
IDLE = "ray::ServeReplica:idle"
MAX_LORAS = 4
ADAPTERS = 32
IDLE_REPLICAS = (1, 8, 16)
ROUNDS = 3
REQUESTS, IN_FLIGHT, MAX_TOKENS = 32, 8, 16
WINDOW_SECONDS = 8.0


def main() -> int:
    """Returns 0."""
    asked = arguments(__doc__)
    if asked.contestant:
        return answer_rounds(open_idle)
    quick = asked.quick
    count, rounds = (MAX_LORAS + 2, 1) if quick else (ADAPTERS, ROUNDS)
    base = base_model()
    report = Report(
        name="scale_serving",
        quick=quick,
        settings={
            "base_model": base.id,
            "rank": 8,
            "max_loras": MAX_LORAS,
            "max_cpu_loras": count,
            "max_tokens": MAX_TOKENS,
            "in_flight": IN_FLIGHT,
        },
        contestants=PARTS,
    )
    variables = {"GRAFT_SERVING_MAX_LORAS": str(MAX_LORAS), "GRAFT_SERVING_MAX_CPU_LORAS": str(count)}
    with temporary_folder() as folder, graft_stack(variables) as stack:
        folders = [
            make_adapter(Path(base.path), folder / f"a{number}", seed=number, scale=0.03) for number in range(count)
        ]
        asyncio.run(measure_way(report, stack, rounds, 8 if quick else REQUESTS))
        asyncio.run(measure_adapters(report, stack, folders))
        measure_controller(report, stack, folder, IDLE_REPLICAS[:1] if quick else IDLE_REPLICAS, 1 if quick else None)
    return report.finish()


async def measure_way(report: Report, stack: Stack, rounds: int, requests: int) -> None:
    """CPU of each process on a request's way, through the gateway's HTTP."""
    ways = {part: find(stack, title) for part, title in ON_THE_WAY.items()}
    spent: dict[str, list[float]] = {part: [] for part in ways}
    async with aiohttp.ClientSession() as session:
        ask = http_ask(session, stack.http, stack.settings.serving.base_model, MAX_TOKENS)
        await drive(ask, questions(IN_FLIGHT, fresh_seed()), IN_FLIGHT)  # once for nothing
        for _ in range(rounds):
            before = {part: cpu_seconds(processes) for part, processes in ways.items()}
            await drive(ask, questions(requests, fresh_seed()), IN_FLIGHT)
            for part, processes in ways.items():
                spent[part].append((cpu_seconds(processes) - before[part]) / requests * 1000)
    for part, values in spent.items():
        add(report, part, Measured(f"CPU of a streamed chat of {MAX_TOKENS} tokens", "ms", values))


async def measure_adapters(report: Report, stack: Stack, folders: Sequence[Path]) -> None:
    """Memory and time of each adapter that the engine takes in."""
    (replica,) = find(stack, ON_THE_WAY["replica"])
    weigh: Callable[[], float] = functools.partial(tree_bytes, replica.pid)
    client = EngineClient(stack.settings.engine_address, token=engine_token(stack.settings))
    try:
        memory, took = [weigh()], list[float]()
        for number, folder in enumerate(folders, start=1):
            took.append((await client.load(adapter_ref(f"a{number}", folder))).load_seconds)
            if number in (MAX_LORAS, len(folders)):
                memory.append(weigh())
        dtype = (await client.residency()).replicas[0].dtype
    finally:
        await client.close()
    report.settings["dtype"] = dtype
    empty, slots, full = memory
    for one in (
        Measured("memory without adapters", "bytes", [empty]),
        Measured("memory of an adapter that fills a slot of the batch", "bytes", [(slots - empty) / MAX_LORAS]),
        Measured("memory of an adapter beyond the slots", "bytes", [(full - slots) / (len(folders) - MAX_LORAS)]),
        Measured("prove and load an adapter from disk", "s", took),
    ):
        add(report, "replica", one)


def measure_controller(
    report: Report, stack: Stack, folder: Path, sizes: Sequence[int], window_seconds: float | None
) -> None:
    """CPU of the controller beside the engine's replica and so many that do nothing."""
    (controller,) = find(stack, CONTROLLER)
    window = window_seconds or WINDOW_SECONDS
    ray = stack.settings.ray
    variables = {**ray_environment(stack.settings), "BENCHMARK_RAY": f"{ray.host}:{ray.port}"}
    add(report, "controller", Measured("cores, replicas @ 1", "cores", [cores(controller, window)]))
    with Contestant("benchmarks.scale_serving", "idle", folder / "idle.log", variables) as idle:
        for size in sizes:
            with console.status(f"{size} replicas that do nothing"):
                idle.play({"replicas": size})
                time.sleep(2)  # what starting them has left to do
                spent = cores(controller, window)
            add(report, "controller", Measured(f"cores, replicas @ {size + 1}", "cores", [spent]))
        weights = [float(pss_bytes(process.pid)) for process in find(stack, IDLE)]
    add(report, "controller", Measured("memory of a replica that does nothing", "bytes", weights))


def open_idle() -> Callable[[Round], Round]:
    """Scales an application that does nothing, in a process of its own: Ray's driver."""
    import ray
    from ray import serve

    ray.init(address=os.environ["BENCHMARK_RAY"], namespace="scale", log_to_driver=False)

    class Idle:
        def __call__(self) -> str:
            return ""

    def play(asked: Round) -> Round:
        options: dict[str, Any] = {"num_replicas": asked["replicas"], "ray_actor_options": {"num_cpus": 0}}
        serve.run(serve.deployment(Idle, name="idle", **options).bind(), name="idle", route_prefix="/idle")
        return {}

    return play


def find(stack: Stack, title: str) -> list[psutil.Process]:
    """The stack's processes of that title. Raises RuntimeError when there is none."""
    processes = descendants(stack.settings.home.path)
    found = [process for process in processes if any(title in line for line in titles([process]))]
    if not found:
        raise RuntimeError(f"The stack has no process {title}; it has {', '.join(sorted(titles(processes)))}.")
    return found


def cpu_seconds(processes: Sequence[psutil.Process]) -> float:
    """What they have used, themselves."""
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def cores(process: psutil.Process, seconds: float) -> float:
    """Cores that it keeps busy over a while."""
    before = cpu_seconds([process])
    started = time.perf_counter()
    time.sleep(seconds)
    return (cpu_seconds([process]) - before) / (time.perf_counter() - started)


if __name__ == "__main__":
    raise SystemExit(main())
