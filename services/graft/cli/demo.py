"""`graft demo`: two real data sets become two adapters, served beside their base, compared with it, and reported.

Owns the order of the demonstration; what it found is told by `graft.cli.demo_outcome`. Everything goes through the
public API; only starting the stack, measuring it and reading MLflow do not.
"""

import asyncio
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from graft.api.v1 import adapter_pb2, fine_tuning_job_pb2
from graft.cli.asking import Asked, ask
from graft.cli.comparing import difference_text
from graft.cli.lineage import Lineage, read_lineage
from graft.cli.progress import JobsProgress
from graft.client import AsyncGraft, Connection
from graft.data import samples
from graft.domain.errors import FailedPrecondition
from graft.domain.names import parse_model, registered_model
from graft.evaluation import charts, metrics
from graft.evaluation.report import Contestant, LossPoint, Report, Task, write
from graft.settings import Settings
from graft.stack import local
from graft.stack.usage import CpuMeter, Peak, peak_memory

TARGET_POINTS = 15.0
"""What the sentiment adapter should gain on the better of the base's prompts, in percentage points."""
TIME_LIMIT_SECONDS = 600.0
MEMORY_LIMIT_BYTES = 8e9
LINEAGE_SECONDS = 15.0
"""The last metrics reach MLflow a second or two after a job has succeeded."""

Job = fine_tuning_job_pb2.FineTuningJob


@dataclass(frozen=True)
class Part:
    """One task of the demonstration: its rows, how it is prompted and scored."""

    sample: samples.Sample
    metric: str
    n_scored: int
    """Held-out rows that are scored; the others tell what answers cost."""
    shots: int
    epochs: float
    max_tokens: int

    @property
    def scored(self) -> tuple[samples.Row, ...]:
        """Held-out rows to score."""
        return self.sample.heldout[: self.n_scored]

    @property
    def unasked(self) -> tuple[samples.Row, ...]:
        """Held-out rows that no model has seen when costs are measured: no cache answers for them."""
        return self.sample.heldout[self.n_scored :]

    def contestants(self, base: str, adapter: str, rows: Sequence[samples.Row]) -> list[Asked]:
        """Base zero-shot, base few-shot and adapter, all held to the same answers."""
        shots = samples.choose_shots(self.sample, self.shots)
        zero = tuple(samples.zero_shot(row) for row in rows)
        few = tuple(samples.few_shot(row, shots) for row in rows)
        stop = () if self.sample.labels else ("\n",)
        return [
            Asked(model, prompts, self.sample.labels, self.max_tokens, stop)
            for model, prompts in ((base, zero), (base, few), (adapter, zero))
        ]

    @property
    def contestant_names(self) -> tuple[str, str, str]:
        """In the order of `contestants`."""
        return "base, zero-shot", f"base, {self.shots}-shot", "adapter"

    def score(self, answers: Sequence[str]) -> tuple[float, ...]:
        """One score in [0, 1] for each scored row."""
        function = metrics.accuracy if self.sample.labels else metrics.rouge_l
        return tuple(function(answers, [samples.answer(row) for row in self.scored]))


def parts() -> list[Part]:
    """The demonstration's two tasks, of a size that two cores train and answer in minutes."""
    return [
        Part(samples.reviews(400, 300 + 30), "accuracy", n_scored=300, shots=8, epochs=1.0, max_tokens=8),
        Part(samples.docstrings(200, 48 + 12), "ROUGE-L", n_scored=48, shots=3, epochs=1.0, max_tokens=32),
    ]


@dataclass
class Trained:
    """A job of the demonstration, followed to its end."""

    part: Part
    job: Job
    heldout_digest: str
    dataset_digest: str
    first_token_seconds: float | None = None
    """From the start of publishing to the first token of the version's first streamed answer."""
    state_times: dict[str, float] = field(default_factory=dict)
    """Unix seconds at which each state began."""
    lineage: Lineage | None = None
    ended: bool = False

    @property
    def training_seconds(self) -> float:
        """From the first worker's start to the end of training."""
        return self.state_times["REGISTERING"] - self.state_times["STARTING"]


@dataclass(frozen=True)
class Outcome:
    """What the demonstration found."""

    report: Report
    path: Path
    seconds: float
    peak: Peak


class Demo:
    """Runs the demonstration against the stack of `settings`, telling `console` of each step."""

    def __init__(
        self, settings: Settings, console: Console, report_path: Path | None = None, tasks: Sequence[Part] = ()
    ) -> None:
        """`tasks` other than the demonstration's own; the first one's advantage is the verdict."""
        self._settings = settings
        self._tasks = tasks or parts()
        self._console = console
        self._home = settings.home.path
        self._report_path = report_path
        gateway = settings.gateway
        self._connection = Connection(address=f"{gateway.host}:{gateway.grpc_port}")
        self._base = settings.serving.base_model

    def run(self, *, keep: bool) -> Outcome:
        """Starts the stack unless it runs, and ends it again unless it ran or `keep`. Raises GraftError."""
        started = time.monotonic()
        running = local.read_status(self._home)
        self._console.print("1. The stack", style="bold")
        if running is not None and running["ready"]:
            self._console.print(f"   runs already (pid {running['pid']}), and will go on running")
        else:
            local.start_detached(self._settings, _StackLines(self._console).show)
        try:
            with peak_memory(self._home) as peak:
                tasks_done = asyncio.run(self._work(self._tasks))
            seconds = time.monotonic() - started
            report = self._report(tasks_done, peak, seconds)
            path = self._report_path or self._home / "reports" / f"demo-{datetime.now():%Y%m%d-%H%M%S}.html"
            return Outcome(report, write(report, path), seconds, peak)
        finally:
            if running is None and not keep:
                with self._console.status("Stopping the stack"):
                    local.stop(self._home)

    async def _work(self, tasks: Sequence[Part]) -> list[Task]:
        async with AsyncGraft(self._connection) as graft:
            before = await self._engines(graft)
            self._console.print("2. Data sets", style="bold")
            trained = [await self._submit(graft, part) for part in tasks]
            self._console.print("3. Fine-tuning", style="bold")
            await self._follow(graft, trained)
            self._console.print("4. Registry and engine", style="bold")
            for each in trained:
                await self._check_lineage(graft, each)
            await self._check_residency(graft, trained, before)
            self._console.print("5. Held-out examples, base and adapters mixed", style="bold")
            return await self._compare(graft, trained)

    async def _engines(self, graft: AsyncGraft) -> dict[str, int]:
        """Restarts of each replica's engine."""
        return {replica.replica: replica.engine_restarts for replica in await graft.residency()}

    async def _submit(self, graft: AsyncGraft, part: Part) -> Trained:
        """Uploads the rows and the held-out rows, and creates the job, which is told of the former only."""
        folder = self._home / "demo"
        folder.mkdir(parents=True, exist_ok=True)
        name = part.sample.name
        train = await graft.upload_dataset(samples.write_rows(part.sample.train, folder / f"{name}.jsonl"))
        heldout = await graft.upload_dataset(samples.write_rows(part.sample.heldout, folder / f"{name}-heldout.jsonl"))
        job = await graft.create_job(
            self._base, train.name, suffix=name, hyperparameters={"epochs": part.epochs}, metadata={"made-by": "demo"}
        )
        self._console.print(
            f"   {name}: {part.sample.title} ({part.sample.source}), {train.row_count} rows to train on, "
            f"{heldout.row_count} held out; job {_id(job.name)}",
            highlight=False,
            soft_wrap=True,
        )
        return Trained(part, job, heldout.digest, train.digest)

    async def _follow(self, graft: AsyncGraft, trained: Sequence[Trained]) -> None:
        """All jobs at once. Raises FailedPrecondition for the first that fails. Cancels the others, or all of them
        when interrupted."""
        try:
            with JobsProgress(self._console) as progress:
                for each in trained:
                    progress.add(each.job.name, each.part.sample.name)
                async with asyncio.TaskGroup() as group:
                    for each in trained:
                        group.create_task(self._follow_one(graft, each, progress))
        except BaseException as error:
            for each in trained:
                if not each.ended:
                    await graft.cancel_job(each.job.name)
            if isinstance(error, BaseExceptionGroup):
                raise error.exceptions[0] from None
            raise

    async def _follow_one(self, graft: AsyncGraft, each: Trained, progress: JobsProgress) -> None:
        asking: asyncio.Task[float] | None = None
        async for update in graft.watch_job(each.job.name):
            event, each.job = update.event, update.fine_tuning_job
            progress.update(each.job.name, update.fine_tuning_job, event)
            if event.type == "state":
                each.state_times[str(event.data["state"])] = event.create_time.ToNanoseconds() / 1e9
            if "publish_start_time_seconds" in event.data.fields:
                version = f"{self._base}:{each.part.sample.name}@{event.data['version']:.0f}"
                row = each.part.scored[0]
                asking = asyncio.create_task(_first_token(graft, version, row))
                asking_since = event.data.fields["publish_start_time_seconds"].number_value
        each.ended = True
        each.job = await graft.job(each.job.name)
        if each.job.state != Job.STATE_SUCCEEDED:
            raise FailedPrecondition(
                f"Job {_id(each.job.name)} ({each.part.sample.name}) ended as "
                f"{Job.State.Name(each.job.state).removeprefix('STATE_')}: {each.job.error.message}",
                reason="DEMO_JOB_FAILED",
            )
        if asking is not None:
            each.first_token_seconds = await asking - asking_since

    async def _check_lineage(self, graft: AsyncGraft, each: Trained) -> None:
        model = parse_model(each.job.fine_tuned_model)
        if model.adapter is None or model.version is None:
            raise FailedPrecondition(f"{each.job.fine_tuned_model!r} names no version.", reason="NO_VERSION")
        name = registered_model(self._connection.project, model.base, model.adapter)
        deadline = time.monotonic() + LINEAGE_SECONDS
        while True:
            lineage = await read_lineage(self._settings.tracking_uri, name, model.version)
            if lineage.finished or time.monotonic() > deadline:
                break
            await asyncio.sleep(0.5)
        bases = {base.model: base.digest for base in await graft.base_models()}
        lineage.check(
            {
                "graft.job": _id(each.job.name),
                "graft.dataset_digest": each.dataset_digest,
                "graft.base_model_digest": bases[self._base],
            }
        )
        each.lineage = lineage
        self._console.print(
            f"   {each.job.fine_tuned_model}: MLflow run {lineage.run_id}, {len(lineage.params)} parameters, "
            f"{len(lineage.losses)} losses, data {each.dataset_digest[:19]}…, base {bases[self._base][:19]}…, "
            f"{lineage.tags['graft.code_version']}",
            highlight=False,
            soft_wrap=True,
        )

    async def _check_residency(self, graft: AsyncGraft, trained: Sequence[Trained], before: dict[str, int]) -> None:
        """Raises FailedPrecondition unless the engines of before hold every adapter and were never restarted."""
        replicas = await graft.residency()
        after = {replica.replica: replica.engine_restarts for replica in replicas}
        if after != before:
            raise FailedPrecondition(
                f"The inference service restarted while jobs ran: {before} before, {after} after.",
                reason="ENGINE_RESTARTED",
            )
        in_engine = adapter_pb2.ResidentAdapter.TIER_ENGINE
        for replica in replicas:
            held = {adapter.model for adapter in replica.adapters if adapter.tier == in_engine}
            absent = [each.job.fine_tuned_model for each in trained if each.job.fine_tuned_model not in held]
            if absent:
                raise FailedPrecondition(
                    f"Replica {replica.replica} does not hold {', '.join(absent)}.", reason="NOT_RESIDENT"
                )
            self._console.print(
                f"   replica {replica.replica} holds {', '.join(sorted(held))} in an engine that was not restarted",
                highlight=False,
                soft_wrap=True,
            )

    async def _compare(self, graft: AsyncGraft, trained: Sequence[Trained]) -> list[Task]:
        concurrency = self._settings.serving.max_num_seqs
        scored = [each.part.contestants(self._base, each.job.fine_tuned_model, each.part.scored) for each in trained]
        mixed = [contestant for contestants in scored for contestant in contestants]
        with _counting(self._console, "answers", sum(len(contestant.prompts) for contestant in mixed)) as count:
            answers = iter(await ask(graft, mixed, concurrency, count))
        # What a thousand answers of each cost can only be told apart when each is asked alone.
        costs: list[list[float]] = []
        unasked = [each.part.contestants(self._base, each.job.fine_tuned_model, each.part.unasked) for each in trained]
        total = sum(len(contestant.prompts) for contestants in unasked for contestant in contestants)
        with _counting(self._console, "costs", total) as count:
            for contestants in unasked:
                costs.append([])
                for contestant in contestants:
                    meter = CpuMeter(self._home)
                    await ask(graft, [contestant], concurrency, count)
                    costs[-1].append(1000 * meter.seconds() / len(contestant.prompts))
        return [
            _task(each, [next(answers) for _ in contestants], contestants, costs)
            for each, contestants, costs in zip(trained, scored, costs, strict=True)
        ]

    def _report(self, tasks: list[Task], peak: Peak, seconds: float) -> Report:
        advantage, target = 100 * tasks[0].advantage().mean, TARGET_POINTS
        passed = tasks[0].advantage().low > 0
        return Report(
            title="Graft demonstration",
            verdict=_verdict(tasks[0], passed)
            + (
                f" The target of {target:.0f} points is reached."
                if advantage >= target
                else f" The target of {target:.0f} points is missed."
            ),
            passed=passed,
            tasks=tuple(tasks),
            stack={
                "time, set-up aside": f"{_duration(seconds)} (limit {_duration(TIME_LIMIT_SECONDS)})",
                "memory of the stack": f"{peak.serving_bytes / 1e9:.1f} GB at most, summed PSS (limit 8 GB)",
                "memory of training workers": f"{peak.training_bytes / 1e9:.1f} GB at most, summed PSS",
            },
            machine=_machine(),
            created=datetime.now(UTC),
        )


class _StackLines:
    """One line for each process that gets ready."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._told: dict[str, str] = {}

    def show(self, record: dict[str, Any]) -> None:
        """Takes a record of `local.read_status`."""
        for process in record["processes"]:
            name, state = process["name"], process["state"]
            if state in ("ready", "restarting") and self._told.get(name) != state:
                took = f" after {process['ready_seconds']:.0f} s" if state == "ready" else ""
                self._console.print(f"   {name:13}{state}{took}  {process['log']}", highlight=False, soft_wrap=True)
            self._told[name] = state


@contextmanager
def _counting(console: Console, what: str, total: int) -> Iterator[Any]:
    """A bar on a terminal, a line at the end elsewhere. Gives the function that counts one."""
    started = time.monotonic()
    columns = (TextColumn("   {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)
    console.print(f"   {what}: {total} in {time.monotonic() - started:.0f} s", highlight=False)


async def _first_token(graft: AsyncGraft, model: str, row: samples.Row) -> float:
    """Unix seconds at which the first piece of an answer came."""
    first = None
    async for _piece in graft.stream(model, messages=samples.zero_shot(row), max_tokens=1):
        first = first or time.time()
    if first is None:
        raise FailedPrecondition(f"{model} streamed nothing.", reason="EMPTY_ANSWER")
    return first


def _task(each: Trained, answers: list[list[str]], asked: list[Asked], costs: list[float]) -> Task:
    part, job, lineage = each.part, each.job, each.lineage
    assert lineage is not None, "the lineage is checked before anything is asked"
    names = part.contestant_names
    return Task(
        name=part.sample.name,
        title=part.sample.title,
        metric=part.metric,
        source=part.sample.source,
        license=part.sample.license,
        inputs=tuple(row["messages"][1]["content"] for row in part.scored),
        references=tuple(samples.answer(row) for row in part.scored),
        contestants=tuple(
            Contestant(name, question.model, tuple(given), part.score(given), cost)
            for name, question, given, cost in zip(names, asked, answers, costs, strict=True)
        ),
        curve=tuple(LossPoint(step, loss) for step, loss in lineage.losses),
        training={
            "trained tokens": f"{job.progress.trained_tokens:,}",
            "time to train": f"{each.training_seconds:.0f} s",
            "adapter size": f"{job.metrics['adapter_bytes'] / 1e6:.1f} MB",
            "publish to first token": "not measured"
            if each.first_token_seconds is None
            else f"{each.first_token_seconds:.1f} s",
        },
        lineage={
            "job": _id(job.name),
            "model": job.fine_tuned_model,
            "MLflow run": lineage.run_id,
            "training data": each.dataset_digest,
            "held-out data": each.heldout_digest,
            "base model": lineage.tags["graft.base_model_digest"],
            "adapter": lineage.tags["graft.digest"],
            "code": lineage.tags["graft.code_version"],
            **dict(sorted(lineage.params.items())),
        },
    )


def _verdict(task: Task, passed: bool) -> str:
    found = task.advantage()
    gain = difference_text(found.mean, found.low, found.high, charts.PERCENT)
    rival = f"the better prompt of its base ({task.best_base().name.removeprefix('base, ')})"
    if passed:
        return f"The {task.name} adapter beats {rival} by {gain}."
    return f"The {task.name} adapter does not beat {rival} beyond doubt: {gain}."


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _id(name: str) -> str:
    return name.rsplit("/", 1)[-1]


def _machine() -> dict[str, str]:
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": cpu,
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory / 1e9:.0f} GB",
        "system": platform.platform(),
        "Python": platform.python_version(),
    }
