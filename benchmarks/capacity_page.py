"""Writes the tables of `docs/scale.md`: `python -m benchmarks.capacity_page`, after a benchmark has new results.

Owns what follows `<!-- scale:NAME -->` up to the next empty line; what people write around it stays. A test fails when
page and results differ.
"""

import re
from collections.abc import Callable, Sequence

from benchmarks.capacity import (
    ALIAS_SECONDS,
    CAPACITY,
    COPIES_A_JOB,
    EVENTS_A_SECOND,
    MOVED,
    PASS,
    ROOT,
    TRAINING,
    WAITING,
    Capacity,
    Figures,
    load,
    walls,
)

PAGE = ROOT / "docs" / "scale.md"
ADAPTERS, COUNTS = (10, 1_000, 100_000), (1, 10, 100, 1_000)
SIZES = (
    {"adapters": 10, "replicas": 1, "jobs": 1},
    {"adapters": 1_000, "replicas": 10, "jobs": 10},
    {"adapters": 100_000, "replicas": 100, "jobs": 100},
    {"adapters": 100_000, "replicas": 1_000, "jobs": 1_000},
)
SPECIALISTS = 1_000
TABLE = re.compile(r"\A(?:.+\n)*")
STORE_FIGURES = {
    "resolve a name": "ms",
    "resolve names, 16 at a time": "names/s",
    "refuse an unknown name": "ms",
    "list a page of 50 adapters": "ms",
    MOVED: "s",
    "claim 64 jobs of those that wait": "ms",
    "claim when all are taken": "ms",
    "append events of 8 jobs at once": "events/s",
}


def measured_store(figures: Figures) -> str:
    """The store by size, on both databases."""
    lines = [_row("", *(f"{kind}, {n:,}" for kind in ("SQLite", "PostgreSQL") for n in ADAPTERS)), _rule(7)]
    for figure, unit in STORE_FIGURES.items():
        sizes = [figures.sized(figure, kind) for kind in ("sqlite", "postgresql")]
        lines.append(_row(f"{figure}, {unit}", *(_number(found.get(n)) for found in sizes for n in ADAPTERS)))
    return "\n".join(lines)


def measured_registry(figures: Figures) -> str:
    """The mirror's pass by size, and how far the line that is extrapolated is from what was measured."""
    lines = [_row("adapters", "SQLite, s", "the line says", "PostgreSQL, s", "the line says"), _rule(5)]
    kinds = ("sqlite", "postgresql")
    sizes = {kind: figures.sized(PASS, kind, "scale") for kind in kinds}
    for n in sorted({*sizes["sqlite"], *sizes["postgresql"]}):
        cells = [(_number(sizes[kind].get(n)), _number(figures.line(PASS, kind, "scale").at(n))) for kind in kinds]
        lines.append(_row(f"{n:,}", *(cell for pair in cells for cell in pair)))
    return "\n".join(lines)


def measured_rest(figures: Figures) -> str:
    """What does not depend on a count."""
    capacity = Capacity(figures)

    def scale(figure: str, contestant: str = "files") -> float:
        return figures.get("scale", figure, contestant)

    def serving(figure: str, part: str = "replica") -> float:
        return figures.get("scale_serving", figure, part)

    chat = "CPU of a streamed chat of 16 tokens"
    waiting = figures.sized(WAITING, "loop")
    training = figures.sized(TRAINING, "loop")
    idle = figures.sized("cores, replicas", "controller", "scale_serving")
    rows = [
        (
            "an adapter on disk, rank 8, rank 64",
            " and ".join(_size(scale(f"an adapter of rank {r} on disk")) for r in (8, 64)),
        ),
        ("the base model on disk", _size(scale("the base model on disk"))),
        ("publish a version: MLflow on SQLite, on PostgreSQL", _both(figures, "publish a version", " s")),
        ("pull a version into an empty cache", _both(figures, "pull a version into an empty cache", " s")),
        ("log the metrics of a step", _both(figures, "log the metrics of a step", " ms")),
        (
            "prove an adapter that is on disk; prove it and load it into the engine",
            f"{_number(scale('prove an adapter that is on disk') * 1000)}, {_number(capacity.load_seconds * 1000)} ms",
        ),
        ("a replica without adapters, PSS", _size(serving("memory without adapters"))),
        (
            "each of the first four adapters, which take the batch's slots",
            _size(serving("memory of an adapter that fills a slot of the batch")),
        ),
        ("each further adapter", _size(capacity.resident_bytes)),
        (
            "CPU of a streamed chat of 16 tokens: gateway, Serve's proxy, replica without its engine",
            ", ".join(_number(serving(chat, part)) for part in ("gateway", "proxy", "replica")) + " ms",
        ),
        (f"cores of Serve's controller with {_counts(idle)} replicas", _values(idle)),
        (f"cores of the orchestrator with {_counts(waiting)} jobs that wait", _values(waiting)),
        (f"the same with {_counts(training)} that train in silence", _values(training)),
    ]
    return "\n".join([_row("", "measured"), _rule(2), *(_row(*row) for row in rows)])


def by_adapters(figures: Figures) -> str:
    """Store, registry, object storage, disks and engine."""
    capacity = Capacity(figures)
    rows: list[tuple[str, Callable[[float], str]]] = [
        ("store and MLflow: databases", lambda n: _size(capacity.store_bytes(n) + capacity.mlflow_bytes(n))),
        ("store: one moved alias is written in", lambda n: _seconds(capacity.moved_seconds(n))),
        ("registry: the mirror's pass", lambda n: _seconds(capacity.pass_seconds(n))),
        (
            f"registry: an alias is seen within ({ALIAS_SECONDS:.0f} s promised)",
            lambda n: _seconds(capacity.alias_seconds(n)),
        ),
        ("registry: jobs that can be registered in an hour", lambda n: _number(capacity.jobs_an_hour(n))),
        ("object storage: one job an adapter", lambda n: _size(capacity.object_bytes(n))),
        ("disk of each host that has served all", lambda n: _size(capacity.cache_bytes(n))),
        ("memory of a replica that holds all", lambda n: _size(capacity.memory_bytes(n))),
        (f"requests that find their adapter among {CAPACITY}", lambda n: f"{capacity.found(n):.2%}"),
        (
            "what a request waits on average for the others",
            lambda n: _seconds((1 - capacity.found(n)) * capacity.load_seconds),
        ),
    ]
    return _table("adapters", ADAPTERS, rows)


def by_replicas(figures: Figures) -> str:
    """Controller, proxy, gateway and network."""
    capacity = Capacity(figures)
    rows: list[tuple[str, Callable[[float], str]]] = [
        ("controller: cores, of one", lambda n: _number(capacity.controller_cores(n))),
        ("chats a second when all are busy", lambda n: _number(n * capacity.chats_a_second)),
        ("Serve's proxy: cores for them, of one", lambda n: _number(capacity.way_cores("proxy", n))),
        ("gateways: cores for them", lambda n: _number(capacity.way_cores("gateway", n))),
        ("network: sent for one new version", lambda n: _size(capacity.fan_out_bytes(n))),
        ("network: until all have pulled it from MLflow", lambda n: _seconds(capacity.fan_out_seconds(n))),
        (
            "network: the base model, once each",
            lambda n: _size(n * figures.get("scale", "the base model on disk", "files")),
        ),
        ("memory of all, without adapters", lambda n: _size(n * capacity.engine_bytes)),
    ]
    return _table("replicas", COUNTS, rows)


def by_jobs(figures: Figures) -> str:
    """Orchestrator, events and object spill."""
    capacity = Capacity(figures)
    rows: list[tuple[str, Callable[[float], str]]] = [
        ("orchestrator: cores, all waiting", lambda n: _number(capacity.loop_cores(n, WAITING))),
        ("orchestrator: cores, all training", lambda n: _number(capacity.loop_cores(n))),
        ("store: events a second at most", lambda n: _number(n * EVENTS_A_SECOND)),
        ("store: share of what PostgreSQL took", lambda n: f"{n * EVENTS_A_SECOND / capacity.events_a_second:.1%}"),
    ]
    return _table("jobs", COUNTS, rows)


def wall_table(figures: Figures) -> str:
    """Where each stands."""
    lines = [_row("part", "what ends there", "stands at"), _rule(3)]
    lines += [_row(wall.part, wall.what, f"{_number(wall.stands_at)} {wall.unit}") for wall in walls(Capacity(figures))]
    return "\n".join(lines)


def first_walls(figures: Figures) -> str:
    """At each size, the walls that are passed, the furthest first."""
    lines = [_row("adapters", "replicas", "jobs", "passed, and how far", "nearest of the others"), _rule(5)]
    for sizes in SIZES:
        shares = sorted(((wall.share(sizes), wall) for wall in walls(Capacity(figures))), key=lambda pair: -pair[0])
        told = [f"{wall.part} {wall.unit} {_number(share)}×" for share, wall in shares if share > 1]
        rest = next(f"{wall.part} {wall.unit} {share:.0%}" for share, wall in shares if share <= 1)
        lines.append(
            _row(*(f"{sizes[unit]:,}" for unit in ("adapters", "replicas", "jobs")), ", ".join(told) or "none", rest)
        )
    return "\n".join(lines)


def specialists(figures: Figures) -> str:
    """The bill of a thousand, in units that the reader has prices for."""
    capacity, n = Capacity(figures), SPECIALISTS
    job = figures.results["sentiment"]
    core_hours = n * job["seconds"]["job"] * job["machine"]["cores"] / 3600
    event_bytes = figures.sized("bytes of an event", capacity.database)
    events = n * (job["training"]["steps"] + 15) * event_bytes[max(event_bytes)]
    tokens = job["training"]["trained_tokens"]
    rows = [
        (
            f"training, {tokens:,} tokens each, one after the other on {job['machine']['cores']} cores",
            f"{core_hours:,.0f} core hours",
        ),
        (
            f"object storage, {COPIES_A_JOB} copies and {capacity.checkpoints} checkpoints each",
            _size(capacity.object_bytes(n)),
        ),
        (
            "databases: read model, MLflow's registry, events",
            _size(capacity.store_bytes(n) + capacity.mlflow_bytes(n) + events),
        ),
        (f"memory, one replica that holds {CAPACITY} at a time", _size(capacity.memory_bytes(CAPACITY))),
        ("memory, one replica that holds them all (`max_cpu_loras: 1000`)", _size(capacity.memory_bytes(n))),
        ("memory, a replica for each, as models of their own", _size(n * capacity.engine_bytes)),
        ("disk of the replica's host", _size(capacity.cache_bytes(n))),
        ("a thousand chats of 16 tokens", f"{1000 / capacity.chats_a_second * 2 / 3600:.2f} core hours"),
    ]
    return "\n".join([_row(f"{n:,} specialists", "needs"), _rule(2), *(_row(*row) for row in rows)])


SECTIONS: dict[str, Callable[[Figures], str]] = {
    "measured-store": measured_store,
    "measured-registry": measured_registry,
    "measured-rest": measured_rest,
    "adapters": by_adapters,
    "replicas": by_replicas,
    "jobs": by_jobs,
    "walls": wall_table,
    "first-walls": first_walls,
    "specialists": specialists,
}


def filled(text: str, figures: Figures) -> str:
    """The page with every section made anew. Raises ValueError for a page without one of them, or with another."""
    marked = re.findall(r"^<!-- scale:(\S+) -->$", text, re.MULTILINE)
    if sorted(marked) != sorted(SECTIONS):
        raise ValueError(f"docs/scale.md should have the sections {', '.join(SECTIONS)}; it has {', '.join(marked)}.")
    for name, section in SECTIONS.items():
        before, start, rest = text.partition(f"<!-- scale:{name} -->\n")
        text = f"{before}{start}{section(figures)}\n{re.sub(TABLE, '', rest, count=1)}"
    return text


def main() -> int:
    """Writes the page; 0."""
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), load()), encoding="utf-8")
    print(f"Written to {PAGE.relative_to(ROOT)}.")
    return 0


def _table(kind: str, counts: Sequence[int], rows: Sequence[tuple[str, Callable[[float], str]]]) -> str:
    lines = [_row(kind, *(f"{n:,}" for n in counts)), _rule(len(counts) + 1)]
    return "\n".join([*lines, *(_row(what, *(value(n) for n in counts)) for what, value in rows)])


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _rule(columns: int) -> str:
    return "|" + "---|" * columns


def _number(value: float | None) -> str:
    """Three digits that count; a dash for what was not measured."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _seconds(value: float) -> str:
    if value < 1:
        return f"{_number(value * 1000)} ms"
    return f"{_number(value)} s" if value < 120 else f"{_number(value / 60)} min"


def _size(value: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if value >= size:
            return f"{_number(value / size)} {unit}"
    return f"{_number(value / 1000)} kB"


def _both(figures: Figures, figure: str, unit: str) -> str:
    return ", ".join(_number(figures.get("scale", figure, kind)) for kind in ("sqlite", "postgresql")) + unit


def _counts(sizes: dict[int, float]) -> str:
    return ", ".join(f"{n:,}" for n in sorted(sizes))


def _values(sizes: dict[int, float]) -> str:
    return ", ".join(_number(sizes[n]) for n in sorted(sizes))


if __name__ == "__main__":
    raise SystemExit(main())
