"""Capacity on paper: what the measured figures say of any number of adapters, replicas and jobs.

Owns the formulas and where each wall stands. Every number comes from `benchmarks/results/*.json`, from a showcase's
result or from the constants below, each with its source. `benchmarks.capacity_page` writes them down.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.orchestrator.ports import Limits
from graft.settings import OrchestratorSettings, ServingSettings

ROOT = Path(__file__).resolve().parents[1]
ALIAS_SECONDS = 5.0
"""An alias moved in MLflow is honoured within so many seconds (docs: where the truth is)."""
LOAD_TIMEOUT_SECONDS = 120.0
"""`graft.orchestrator.ports.Engine.load`: how long a new version may take to be on every replica."""
PASSES_A_JOB = 3
"""`register` refreshes the mirror once and `promote_first` twice, each reads all of MLflow."""
COPIES_A_JOB = 2
"""Of an adapter: MLflow's artifact, and the run's own folder."""
CACHE_BYTES = 20 * 1024**3
"""The chart's `storage.s3.cacheSize`: a pod whose cache outgrows it is evicted."""
RAY_NODES, RAY_PLACEMENT_GROUPS = 3_000, 1_000
"""Ray's own tested envelope (ray-project/ray, release/benchmarks/README.md)."""
EVENTS_A_SECOND = 1 / Limits().event_interval_seconds
CAPACITY = max(ServingSettings().max_cpu_loras, ServingSettings().max_loras)
POLL_SECONDS = OrchestratorSettings().registry_poll_seconds
WISH_SECONDS = OrchestratorSettings().poll_seconds


@dataclass(frozen=True)
class Line:
    """`a + b * n`: growth between the two largest sizes that were measured, where it shows best; `a` is 0 at least."""

    a: float
    b: float

    def at(self, n: float) -> float:
        """The value for n."""
        return self.a + self.b * n

    def reaches(self, value: float) -> float:
        """The n that has this value."""
        return max((value - self.a) / self.b, 0.0)


class Figures:
    """Medians of benchmark results by figure and contestant."""

    def __init__(self, results: Mapping[str, Any]) -> None:
        self.results = results

    def get(self, benchmark: str, figure: str, contestant: str) -> float:
        """The median. Raises KeyError for a figure that the result has not."""
        for one in self.results[benchmark]["figures"]:
            if (one["figure"], one["contestant"]) == (figure, contestant):
                return float(one["median"])
        raise KeyError(f"{benchmark}.json has no {figure!r} of {contestant}")

    def sized(self, figure: str, contestant: str, benchmark: str = "scale_state") -> dict[int, float]:
        """Medians by size, of figures named `figure @ size`."""
        return {
            int(one["figure"].rpartition("@ ")[2].replace(",", "")): float(one["median"])
            for one in self.results[benchmark]["figures"]
            if one["contestant"] == contestant and one["figure"].startswith(f"{figure} @ ")
        }

    def line(self, figure: str, contestant: str, benchmark: str = "scale_state") -> Line:
        """Through the two largest sizes. Raises ValueError with fewer."""
        *_, (n, low), (m, high) = sorted(self.sized(figure, contestant, benchmark).items())
        b = max((high - low) / (m - n), 1e-12)  # noise may let the larger one be quicker
        return Line(max(low - b * n, 0.0), b)


def load(root: Path = ROOT) -> Figures:
    """The committed results."""
    names = ("scale", "scale_state", "scale_serving", "gateway")
    results = {name: json.loads((root / "benchmarks" / "results" / f"{name}.json").read_text()) for name in names}
    results["sentiment"] = json.loads((root / "docs" / "showcase" / "sentiment.json").read_text())
    return Figures(results)


PASS = "the mirror's pass: everything read from MLflow"
MOVED = "the read model, one alias of it moved"
WAITING, TRAINING = "cores of the orchestrator, jobs QUEUED", "cores of the orchestrator, jobs RUNNING"
CHAT = "CPU of a streamed chat of 16 tokens"


@dataclass(frozen=True)
class Capacity:
    """The formulas. `adapters`, `replicas` and `jobs` are counts; one version an adapter, jobs that train at once."""

    figures: Figures
    database: str = "postgresql"

    def _scale(self, figure: str, contestant: str) -> float:
        return self.figures.get("scale", figure, contestant)

    @property
    def adapter_bytes(self) -> float:
        """On disk, at rank 8."""
        return self._scale("an adapter of rank 8 on disk", "files")

    @property
    def resident_bytes(self) -> float:
        """In an engine's host memory."""
        return self.figures.get("scale_serving", "memory of an adapter beyond the slots", "replica")

    @property
    def engine_bytes(self) -> float:
        """A replica without adapters."""
        return self.figures.get("scale_serving", "memory without adapters", "replica")

    @property
    def load_seconds(self) -> float:
        """Of an adapter that is on the host's disk."""
        return self.figures.get("scale_serving", "prove and load an adapter from disk", "replica")

    @property
    def pull_seconds(self) -> float:
        """Of an adapter, from MLflow into an empty cache."""
        return self._scale("pull a version into an empty cache", self.database)

    def pass_seconds(self, adapters: float) -> float:
        """Everything read from MLflow once."""
        return self.figures.line(PASS, self.database, "scale").at(adapters)

    def alias_seconds(self, adapters: float) -> float:
        """From an alias moved in MLflow to the gateway, at worst: just after a pass has begun, and seen by the next."""
        read = self.pass_seconds(adapters)
        return max(read, POLL_SECONDS) + WISH_SECONDS + read + self.moved_seconds(adapters)

    def moved_seconds(self, adapters: float) -> float:
        """One alias of the read model, compared and written."""
        return self.figures.line(MOVED, self.database).at(adapters)

    def jobs_an_hour(self, adapters: float) -> float:
        """That can be registered, one after the other behind the mirror's lock."""
        each = PASSES_A_JOB * self.pass_seconds(adapters) + 2 * self.moved_seconds(adapters)
        return 3600 / each

    def store_bytes(self, adapters: float) -> float:
        """The read model."""
        sizes = self.figures.sized("bytes of an adapter and its version", self.database)
        return adapters * sizes[max(sizes)]

    def mlflow_bytes(self, adapters: float) -> float:
        """MLflow's database."""
        sizes = self.figures.sized("bytes of a model and its version in MLflow's database", self.database, "scale")
        return adapters * sizes[max(sizes)]

    @property
    def events_a_second(self) -> float:
        """That the store takes from eight jobs at once."""
        sizes = self.figures.sized("append events of 8 jobs at once", self.database)
        return sizes[max(sizes)]

    @property
    def checkpoints(self) -> int:
        """Of the sentiment showcase's job."""
        training = self.figures.results["sentiment"]["training"]
        return int(training["steps"] // training["hyperparameters"]["checkpoint_steps"])

    def object_bytes(self, adapters: float) -> float:
        """In a bucket or a home, of one job an adapter."""
        return adapters * (COPIES_A_JOB + self.checkpoints) * self.adapter_bytes

    def cache_bytes(self, adapters: float) -> float:
        """On the disk of a host that has served them all: nothing is dropped."""
        return adapters * self.adapter_bytes

    def memory_bytes(self, adapters: float) -> float:
        """Of one replica that keeps them all."""
        return self.engine_bytes + adapters * self.resident_bytes

    def found(self, adapters: float) -> float:
        """Share of requests, spread evenly, whose adapter the engine holds already."""
        return min(CAPACITY / adapters, 1.0)

    @property
    def chats_a_second(self) -> float:
        """Of one replica on two cores."""
        return self.figures.get("gateway", "SmolLM2-135M, 8 in flight: requests", "graft-http")

    def way_cores(self, part: str, replicas: float) -> float:
        """Cores of the gateway or of Serve's proxy when every replica is busy."""
        return replicas * self.chats_a_second * self.figures.get("scale_serving", CHAT, part) / 1000

    def controller_cores(self, replicas: float) -> float:
        """Of Serve's controller, which is one process."""
        return self.figures.line("cores, replicas", "controller", "scale_serving").at(replicas)

    def loop_cores(self, jobs: float, figure: str = TRAINING) -> float:
        """Of the orchestrator, whose event loop is one thread."""
        return self.figures.line(figure, "loop").at(jobs)

    def fan_out_bytes(self, replicas: float) -> float:
        """Sent for one new version."""
        return replicas * self.adapter_bytes

    def fan_out_seconds(self, replicas: float) -> float:
        """Until every replica has it, one pull after the other: MLflow has one worker."""
        return replicas * self.pull_seconds


@dataclass(frozen=True)
class Wall:
    """A limit, and how far a size is into it: above 1 it does not hold."""

    part: str
    what: str
    stands_at: float
    unit: str
    """What `stands_at` counts: adapters, replicas or jobs."""

    def share(self, sizes: Mapping[str, float]) -> float:
        """Of the limit that is used up."""
        return sizes[self.unit] / self.stands_at


def walls(capacity: Capacity) -> list[Wall]:
    """All of them, the nearest of each unit first."""
    figures = capacity.figures
    chats = capacity.chats_a_second / 1000
    proxy, gateway = (figures.get("scale_serving", CHAT, part) * chats for part in ("proxy", "gateway"))
    found = [
        Wall(
            "registry",
            "an alias moved in MLflow is seen after five seconds",
            late_at(capacity),
            "adapters",
        ),
        Wall("engine", f"an engine holds {CAPACITY} adapters, more come and go", CAPACITY, "adapters"),
        Wall("hosts' disks", "a pod's cache of 20 GiB is full", CACHE_BYTES / capacity.adapter_bytes, "adapters"),
        Wall(
            "network",
            "a new version is not on every replica in 120 s",
            LOAD_TIMEOUT_SECONDS / capacity.pull_seconds,
            "replicas",
        ),
        Wall("proxy", "Serve's one proxy uses one core", 1 / proxy, "replicas"),
        Wall("gateway", "ten gateways use a core each", 10 / gateway, "replicas"),
        Wall(
            "controller",
            "Serve's controller uses one core",
            figures.line("cores, replicas", "controller", "scale_serving").reaches(1.0),
            "replicas",
        ),
        Wall("Ray", "nodes in Ray's tested envelope", RAY_NODES, "replicas"),
        Wall("store", "jobs that all write four events a second", capacity.events_a_second / EVENTS_A_SECOND, "jobs"),
        Wall(
            "orchestrator",
            "its loop uses one core for jobs in silence",
            figures.line(TRAINING, "loop").reaches(1.0),
            "jobs",
        ),
        Wall("tracking", "MLflow's one worker takes a step's metrics of each", _tracked(capacity), "jobs"),
        Wall("Ray", "placement groups in Ray's tested envelope", RAY_PLACEMENT_GROUPS, "jobs"),
    ]
    units = ("adapters", "replicas", "jobs")
    return sorted(found, key=lambda wall: (units.index(wall.unit), wall.stands_at))


def late_at(capacity: Capacity) -> float:
    """Adapters with which an alias is as late as it may be, by bisection: the formula only grows."""
    low, high = 1.0, 1e9
    while high - low > 0.5:
        middle = (low + high) / 2
        low, high = (low, middle) if capacity.alias_seconds(middle) > ALIAS_SECONDS else (middle, high)
    return high


def _tracked(capacity: Capacity) -> float:
    """Jobs like the sentiment showcase's, each step of which is one call."""
    job = capacity.figures.results["sentiment"]
    steps_a_second = job["training"]["steps"] / job["seconds"]["job"]
    return 1000 / capacity.figures.get("scale", "log the metrics of a step", capacity.database) / float(steps_a_second)
