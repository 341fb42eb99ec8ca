"""`graft demo`: two real data sets become two adapters, served beside their base, compared with it, and reported.

Owns the order of the demonstration; what it found is told by `graft.cli.demo_outcome`. Everything goes through the
public API; only starting the stack, measuring it and reading MLflow do not.
"""

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from graft.api.v1 import adapter_pb2, fine_tuning_job_pb2
from graft.cli import demo_report
from graft.cli.asking import ask
from graft.cli.demo_parts import Part, parts
from graft.cli.demo_report import Trained
from graft.cli.lineage import read_lineage
from graft.cli.output import short_id
from graft.cli.progress import JobsProgress
from graft.client import AsyncGraft, Connection
from graft.data import samples
from graft.domain.errors import FailedPrecondition
from graft.domain.names import parse_model, registered_model
from graft.evaluation.report import Report, Task, write
from graft.settings import Settings
from graft.stack import local
from graft.stack.usage import CpuMeter, Peak, peak_memory

LINEAGE_SECONDS = 15.0
"""The last metrics reach MLflow a second or two after a job has succeeded."""

Job = fine_tuning_job_pb2.FineTuningJob


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
        self._connection = Connection(settings.gateway_address, root_certificate=settings.gateway.tls_certificate)
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
            report = demo_report.report(tasks_done, peak, seconds)
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
            f"{heldout.row_count} held out; job {short_id(job.name)}",
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
                f"Job {short_id(each.job.name)} ({each.part.sample.name}) ended as "
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
                "graft.job": short_id(each.job.name),
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
            demo_report.task(each, [next(answers) for _ in contestants], contestants, costs)
            for each, contestants, costs in zip(trained, scored, costs, strict=True)
        ]


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
