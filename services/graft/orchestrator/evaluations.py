"""Evaluations as jobs: claims one at a time by lease, asks each contestant, measures, and logs what was found.

One at a time, and one contestant after another, so that latency and tokens/s are each contestant's own. Answers are
kept as they come (`graft.orchestrator.asking`): a restarted orchestrator asks only what is missing. What is away once
all answers are there does not cost them: grader and storage are waited for, memory and MLflow can be missing.
"""

import asyncio
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar

import structlog

from graft.data.questions import Questions, choose_shots, read_questions
from graft.data.tasks.definition import TaskDefinition
from graft.data.tasks.definition import load as load_task
from graft.data.tokenizers import load_tokenizer
from graft.domain.errors import Aborted, GraftError, Internal, NotFound, Unavailable
from graft.domain.evaluations import Contestant, ContestantResult, Evaluation, EvaluationState
from graft.domain.jobs import JobError
from graft.domain.names import parse_model
from graft.domain.resources import Dataset
from graft.evaluation.comparison_page import write
from graft.evaluation.outcome import Measured, Subject, compare, results_of
from graft.orchestrator.asking import Answer, Answers, Asked, ask_all
from graft.orchestrator.evaluating import adapter_ref, engine_context_tokens
from graft.orchestrator.files import located
from graft.orchestrator.judging import passes
from graft.orchestrator.newer import unknown_in_evaluation
from graft.orchestrator.patience import patiently
from graft.orchestrator.ports import Parts
from graft.orchestrator.threads import call, to_the_end

log = structlog.get_logger()
P = ParamSpec("P")
T = TypeVar("T")

TELL_SECONDS = 1.0
"""How often progress is written, and a wish to cancel is seen."""
LOG_SECONDS = 120.0
"""How long MLflow may be away before an evaluation ends without it: it restarts within 30 s, on a busy machine in a
multiple, and somebody waits for figures that are there."""
_METRIC_NAME = re.compile(r"[^\w\-./ ]")
"""What MLflow's names of metrics may not hold."""


class Evaluations:
    """The loop. `run` until cancelled; an evaluation in its hands is then free for the next owner."""

    def __init__(self, parts: Parts, owner: str) -> None:
        self._parts = parts
        self._owner = owner
        self._lease = timedelta(seconds=parts.settings.orchestrator.lease_seconds)
        self._passed_on: set[str] = set()
        """Those of a newer Graft."""

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self._end_unclaimed()
                found = await self._parts.store.claim_evaluation(self._owner, self._lease, self._passed_on)
                if found is not None:
                    await self._take(found)
                    continue
            except Unavailable as error:
                log.warning("evaluations_wait", error=error.message)
            except Aborted as error:
                log.warning("evaluation_dropped", error=error.message)
            except Exception as error:
                log.error("evaluations_failed", exc_info=error)
            await asyncio.sleep(self._parts.settings.orchestrator.poll_seconds)

    async def _end_unclaimed(self) -> None:
        """Those whose cancelling is wished need no turn for it."""
        for evaluation_id in await self._parts.store.end_cancelled_evaluations():
            log.info("evaluation_ended", evaluation=evaluation_id, state=EvaluationState.CANCELLED.value)

    async def _take(self, evaluation: Evaluation) -> None:
        if unknown := unknown_in_evaluation(evaluation):
            log.warning("evaluation_passed_on", evaluation=evaluation.id, unknown=unknown)
            self._passed_on.add(evaluation.id)
            await self._parts.store.release_evaluation(evaluation, self._owner)
            return
        work = _Work(self._parts, self._owner, self._lease, evaluation)
        asking = asyncio.create_task(work.do())
        try:
            while True:
                done, _ = await asyncio.wait({asking}, timeout=TELL_SECONDS)
                if done:
                    break
                told = await work.tell()
                if told.cancel_requested:
                    await _stopped(asking)
                    await work.end(EvaluationState.CANCELLED)
                    return
                await self._end_unclaimed()
            await self._finish(work, asking)
        except asyncio.CancelledError:
            await _stopped(asking)  # before another owner may begin: both would write the same files
            with suppress(GraftError):
                await self._parts.store.release_evaluation(evaluation, self._owner)
            raise
        finally:
            await _stopped(asking)

    async def _finish(self, work: "_Work", asking: asyncio.Task[None]) -> None:
        error = asking.exception()
        if error is None:
            return
        if isinstance(error, Aborted) or (isinstance(error, Unavailable) and error.reason == "STORE_UNAVAILABLE"):
            raise error
        if not isinstance(error, GraftError):
            log.error("evaluation_failed", evaluation=work.evaluation.id, exc_info=error)
            error = Internal(
                f"A defect in Graft ended the evaluation: {type(error).__name__}. The orchestrator's log has the rest "
                f"under evaluation {work.evaluation.id}.",
                reason="INTERNAL",
            )
        await work.end(EvaluationState.FAILED, JobError(error.code, error.reason, error.message))


@dataclass
class _Work:
    """One evaluation, from its data to its report."""

    parts: Parts
    owner: str
    lease: timedelta
    evaluation: Evaluation
    answered: int = 0
    total: int = 0

    @property
    def folder(self) -> Path:
        """Where answers and report are kept."""
        return self.parts.settings.evaluation_dir(self.evaluation.project, self.evaluation.id)

    async def tell(self) -> Evaluation:
        """Writes how far it is, and holds the lease. Raises Aborted when it is lost."""
        return await self.parts.store.renew_evaluation(
            self.evaluation, self.owner, self.lease, self.answered, self.total
        )

    async def end(self, state: EvaluationState, error: JobError | None = None) -> None:
        """Ends it without results."""
        await self.tell()
        await self.parts.store.end_evaluation(self.evaluation, self.owner, state, error=error)
        log.info("evaluation_ended", evaluation=self.evaluation.id, state=state.value, reason=error and error.reason)

    async def do(self) -> None:
        """Asks, measures and ends in SUCCEEDED. Raises what keeps it from that."""
        spec, store = self.evaluation.spec, self.parts.store
        dataset = await store.get_dataset(self.evaluation.project, spec.dataset)
        task = load_task(spec.task_definition) if spec.task_definition else None
        storage, graded = self.parts.storage, spec.grader is not None
        held_out = await self._stored(located, storage, dataset)
        questions = await call(_read, held_out, task, spec.max_rows, graded=graded)
        shown: Questions | None = None
        if spec.shots_dataset is not None:
            others = await store.get_dataset(self.evaluation.project, spec.shots_dataset)
            shown = await call(_read, await self._stored(located, storage, others), task, 0)
        asked = [await self._asked(contestant, shown) for contestant in spec.contestants]
        files = [self.folder / f"answers-{place}.jsonl" for place in range(len(asked))]
        await self._stored(self._recall, files)
        answers = [await call(Answers, file) for file in files]
        self.answered = sum(len(each.found) for each in answers)
        self.total = len(questions.items) * sum(1 + one.samples * graded for one in asked)
        measured = []
        for contestant, one, kept, file in zip(spec.contestants, asked, answers, files, strict=True):
            resumed = bool(kept.found)
            seconds = await ask_all(self.parts.engine.of(one.base.id), one, questions, kept, self._count)
            await self._stored(self._share, file)
            passed = await passes(spec.grader, questions, kept, self.parts.limits, self._count) if spec.grader else []
            subject = replace(await self._subject(contestant), memory_bytes=await self._memory_bytes(one.base.id))
            measured.append(Measured(subject, _in_order(kept, questions), passed, 0.0 if resumed else seconds))
        metrics = spec.metrics or questions.metrics
        comparison = await call(
            compare,
            questions,
            metrics,
            measured,
            title=spec.display_name or f"{dataset.display_name}, {len(questions.items)} held-out rows",
            dataset=dataset,
            created=datetime.now(UTC),
        )
        remarks = tuple(
            _remark(contestant.label, one.context_tokens, kept)
            for contestant, one, kept in zip(spec.contestants, asked, answers, strict=True)
            if any(answer.unanswered for answer in kept.found.values())
        )
        if remarks:
            comparison = replace(comparison, notes={**comparison.notes, "unanswered": " ".join(remarks)})
        report = self.folder / "report.html"
        await to_the_end(call(write, comparison, report))
        await self._stored(self._share, report)  # where the gateway reads it
        results = await call(results_of, comparison, spec.contestants, measured)
        run_id, missing = await self._logged(comparison.headline, dataset, results)
        await self.tell()
        await store.end_evaluation(
            self.evaluation,
            self.owner,
            EvaluationState.SUCCEEDED,
            results=results,
            verdicts=(comparison.headline, *comparison.remarks, *remarks, *missing),
            mlflow_run_id=run_id,
        )
        log.info("evaluation_ended", evaluation=self.evaluation.id, state="SUCCEEDED")

    async def _stored(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What comes of a call to the storage, which is waited for."""
        return await patiently("The storage", partial(call, function, *args, **kwargs), self.parts.limits)

    def _share(self, file: Path) -> None:
        """For the gateway, and for an orchestrator on another host that goes on from here."""
        if (storage := self.parts.storage).shared and file.is_file():
            storage.put_file(file, self._uri(file))

    def _recall(self, files: list[Path]) -> None:
        """Answers of the contestants that an orchestrator on another host has finished with."""
        for file in files:
            if self.parts.storage.shared and not file.is_file():
                with suppress(NotFound):
                    answered = self.parts.storage.read(self._uri(file))
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(answered)

    def _uri(self, file: Path) -> str:
        return self.parts.storage.uri("evaluations", self.evaluation.project, self.evaluation.id, file.name)

    async def _memory_bytes(self, base: str) -> int | None:
        """Of the base's largest replica; None when it does not tell."""
        try:
            held = await self.parts.engine.of(base).residency()
        except GraftError as error:
            log.warning("memory_unknown", evaluation=self.evaluation.id, base_model=base, error=error.message)
            return None
        return max((replica.memory_bytes for replica in held.replicas), default=0) or None

    def _count(self, more: int = 1) -> None:
        self.answered += more

    async def _asked(self, contestant: Contestant, shown: Questions | None) -> Asked:
        spec, store, project = self.evaluation.spec, self.parts.store, self.evaluation.project
        name = parse_model(contestant.model)
        base = await store.get_base_model(name.base, project)
        adapter = None
        if name.adapter is not None:
            found = await store.resolve_version(
                project, name.base, name.adapter, version=name.version, alias=name.alias
            )
            adapter = adapter_ref(found)
        return Asked(
            adapter=adapter,
            public_model=contestant.model,
            base=base,
            context_tokens=engine_context_tokens(base, self.parts.settings.serving),
            tokenizer=partial(load_tokenizer, base.path),
            shots=tuple(choose_shots(shown, contestant.shots)) if shown and contestant.shots else (),
            samples=spec.samples or 1,
            max_tokens=spec.max_tokens,
            limits=self.parts.limits,
        )

    async def _subject(self, contestant: Contestant) -> Subject:
        store, project, name = self.parts.store, self.evaluation.project, parse_model(contestant.model)
        base = await store.get_base_model(name.base, project)
        if name.adapter is None:
            # A project's own base model is a full model that one of its jobs has trained.
            tuned = bool(base.project)
            return Subject(contestant.label, contestant.model, tuned, base.parameter_count, base.size_bytes)
        found = await store.resolve_version(project, name.base, name.adapter, version=name.version, alias=name.alias)
        # An adapter's weights are float32: four bytes each.
        return Subject(
            contestant.label,
            contestant.model,
            True,
            base.parameter_count + found.size_bytes // 4,
            base.size_bytes + found.size_bytes,
        )

    async def _logged(
        self, headline: str, dataset: Dataset, results: Sequence[ContestantResult]
    ) -> tuple[str | None, tuple[str, ...]]:
        """The MLflow run's id, or None and a sentence that tells why there is none."""
        try:
            async with asyncio.timeout(LOG_SECONDS):
                log_it = partial(call, self._log, headline, dataset, results)
                return await patiently("MLflow", log_it, self.parts.limits), ()
        except Exception as error:  # whatever MLflow's client raises, the figures are there
            log.warning("evaluation_not_logged", evaluation=self.evaluation.id, exc_info=error)
            why = error.message if isinstance(error, GraftError) else f"{type(error).__name__}."
            if isinstance(error, TimeoutError):
                why = f"it did not answer for {LOG_SECONDS:.0f} s."
            return None, (f"MLflow has no complete run of this evaluation: {why} The figures and the report are kept.",)

    def _log(self, headline: str, dataset: Dataset, results: Sequence[ContestantResult]) -> str:
        spec, registry = self.evaluation.spec, self.parts.registry
        params = {"dataset": spec.dataset, "contestants": ", ".join(one.label for one in spec.contestants)}
        tags = {
            "graft.evaluation": self.evaluation.id,
            "graft.dataset_digest": dataset.digest,
            "graft.verdict": headline,
        }
        run_id = registry.start_run(self.evaluation.project, self.evaluation.id, 1, params, tags)
        figures = {
            _METRIC_NAME.sub("_", f"{result.label}/{figure.metric}"): figure.value
            for result in results
            for figure in result.figures
        }
        registry.log_metrics(run_id, figures, 0)
        registry.log_file(run_id, self.folder / "report.html")
        registry.finish_run(run_id, "FINISHED")
        return run_id


def _read(dataset: Dataset, task: TaskDefinition | None, max_rows: int, *, graded: bool = False) -> Questions:
    return read_questions(Path(dataset.uri), dataset.format, task, max_rows=max_rows, graded=graded)


async def _stopped(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.wait({task})


def _remark(label: str, context_tokens: int, answers: Answers) -> str:
    count = sum(bool(answer.unanswered) for answer in answers.found.values())
    return (
        f"{label} has no answer to {count} of {len(answers.found)} questions, which do not fit into its context of "
        f"{context_tokens} tokens; they count as wrong, pairs as undecided, and in no latency."
    )


def _in_order(answers: Answers, questions: Questions) -> tuple[Answer, ...]:
    return tuple(answers.found[row] for row in range(len(questions.items)))
