"""Takes a plan through its steps by the public API: data, base, job, evaluation. Starts nothing but these.

Every step is written down before the next (`showcase.progress`), and asked for with a request id that is written down
before it: an interrupted showcase goes on where it was. Does not know how results are told (`showcase.page`).
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.common import commit, machine, versions
from rich.console import Console

from graft.api.v1 import deployment_pb2, evaluation_pb2, fine_tuning_job_pb2
from graft.cli.deriving import Deriving
from graft.cli.job_options import what_it_does
from graft.cli.output import as_dict, short_id
from graft.cli.progress import JobsProgress
from graft.client import Graft
from graft.client.requests import EvaluationOptions, JobOptions
from graft.data import samples
from graft.domain.errors import FailedPrecondition, NotFound
from graft.registry import catalog
from graft.registry.base_models import ensure_base_model
from graft.registry.derive import Request, derive
from graft.settings import Settings
from showcase.counting import count_tokens
from showcase.plans import LIMIT_SECONDS, TOKENS_PER_SECOND, Plan
from showcase.progress import Progress
from showcase.sources import Sources

POLL_SECONDS = 1.0
NOTICE_SECONDS = 60.0
"""The orchestrator looks at the catalogue every few seconds."""
RESULTS = ("job", "job_request", "evaluation", "evaluation_request", "evaluated")
"""What is done again when the data is."""
Job = fine_tuning_job_pb2.FineTuningJob
Evaluation = evaluation_pb2.Evaluation


class Run:
    """One showcase against the stack of `settings`, which must be running."""

    def __init__(self, settings: Settings, graft: Graft, console: Console, plan: Plan, *, quick: bool = False) -> None:
        self._settings = settings
        self._graft = graft
        self._console = console
        self._plan = plan
        self._quick = quick
        self._large = settings.serving.base_model
        self._base = plan.derived.name if plan.derived else self._large
        self._name = f"{plan.name}-quick" if quick else plan.name
        self._folder = settings.home.path / "showcase"
        self._material = plan.make(plan.n_train, plan.n_heldout, Sources(settings.home.cache / "showcase"))
        self._progress = Progress(
            self._folder / f"{self._name}.json", [_told(plan), _told(self._material), self._large]
        )

    def do(self) -> dict[str, Any]:
        """All steps that are not done yet; the result as JSON. Raises GraftError."""
        if self._progress.seconds:
            self._say("goes on from what an earlier run has finished")
        with self._timed("data"):
            train, heldout = self._dataset("train"), self._dataset("heldout")
            steps = self._steps()
        if not self._progress.get("evaluated"):
            with self._timed("base"):
                self._ensure_base()
        job = self._job(train, steps)
        evaluation = self._evaluation(train, heldout, job)
        if not self._progress.get("evaluated"):
            self._progress.keep("evaluated", evaluation.name)
            if self._plan.derived:
                self._graft.undeploy_model(self._base)  # its engine holds memory
        return self._result(job, evaluation, steps)

    def _say(self, text: str) -> None:
        self._console.print(f"{self._plan.name}: {text}", highlight=False, markup=False, soft_wrap=True)

    # The base model

    def _ensure_base(self) -> None:
        """Makes and serves the smaller base, unless it is there. Raises FailedPrecondition when it cannot be served."""
        derived = self._plan.derived
        if derived is None:
            return
        if derived.name not in catalog.entries(self._settings):
            self._say(f"making {derived.name}, {derived.layers} layers of {self._large}")
            request = Request(
                self._large, derived.name, derived.layers, tokens=derived.tokens, max_minutes=derived.max_minutes
            )
            with Deriving(self._console) as shown:
                derive(self._settings, request, shown.report)
        self._say(f"serving {derived.name}")
        deployment = self._deployed(derived.name)
        while deployment.state == deployment.STATE_STARTING:
            time.sleep(POLL_SECONDS)
            deployment = self._graft.deployment(derived.name)
        if deployment.state != deployment.STATE_READY:
            raise FailedPrecondition(
                f"{derived.name} is not served: {deployment.error.message}", reason="SHOWCASE_NOT_DEPLOYED"
            )

    def _deployed(self, base: str) -> deployment_pb2.Deployment:
        """Asks for it once the stack has noticed the new base, which takes it some seconds."""
        give_up = time.monotonic() + NOTICE_SECONDS
        while True:
            try:
                return self._graft.deploy_model(base)
            except NotFound:
                if time.monotonic() > give_up:
                    raise
            time.sleep(POLL_SECONDS)

    # The data

    def _dataset(self, side: str) -> str:
        """Uploads the rows of a side, unless they are there. Returns the data set's id."""
        if known := self._progress.get(side):
            try:
                return short_id(self._graft.dataset(known).name)
            except NotFound:
                self._progress.forget(side, *RESULTS)
        rows = self._material.train if side == "train" else self._material.heldout
        self._folder.mkdir(parents=True, exist_ok=True)
        path = samples.write_rows(rows, self._rows_path(side))
        found = self._graft.upload_dataset(path, format=self._material.format)
        self._say(f"{self._material.title}: {found.row_count} rows {'to train on' if side == 'train' else 'held out'}")
        return self._progress.keep(side, short_id(found.name))

    def _rows_path(self, side: str) -> Path:
        return self._folder / f"{self._name}-{side}.jsonl"

    def _steps(self) -> int:
        """As many as the token budget allows. The tokens are counted by the base model's own tokenizer."""
        if known := self._progress.get("steps"):
            return int(known)
        plan, rows = self._plan, len(self._material.train)
        base = ensure_base_model(self._settings, self._large, self._say)
        tokens = count_tokens(self._rows_path("train"), self._material.format, plan, base)
        steps = plan.steps(rows, tokens, plan.token_budget)
        minutes = plan.token_budget / TOKENS_PER_SECOND / 60
        self._say(
            f"{tokens:,} tokens in {rows} rows; {steps} steps of {plan.batch_size} within "
            f"{plan.token_budget:,} tokens, {minutes:.0f} minutes at most at {TOKENS_PER_SECOND:.0f} tokens/s"
        )
        return int(self._progress.keep("steps", str(steps)))

    # The job

    def _job(self, train: str, steps: int) -> Job:
        """The succeeded job. Raises FailedPrecondition when it ends otherwise; the next run then makes another."""
        if self._progress.get("evaluated"):
            return self._graft.job(self._progress.get("job"))
        plan = self._plan
        options: JobOptions = {
            "suffix": self._name,
            "method": plan.method,
            "method_options": plan.method_options,
            "tuning": plan.tuning,
            "task": plan.task,
            "hyperparameters": {"max_steps": steps, "batch_size": plan.batch_size},
            "metadata": {"made-by": "showcase"},
            "request_id": self._progress.request_id("job"),
        }
        job = self._graft.create_job(self._base, train, **options)
        self._progress.keep("job", short_id(job.name))
        if not job.HasField("end_time"):
            self._say(f"job {short_id(job.name)}: {what_it_does(job)}")
            with self._timed("job") as check, JobsProgress(self._console) as progress:
                progress.add(job.name, self._name)
                for update in self._graft.watch_job(job.name):
                    progress.update(job.name, update.fine_tuning_job, update.event)
                    check(lambda: self._graft.cancel_job(job.name))
        job = self._graft.job(job.name)
        if job.state != Job.STATE_SUCCEEDED:
            self._progress.forget("job", "job_request")
            raise FailedPrecondition(
                f"Job {short_id(job.name)} of the showcase {plan.name} has ended as "
                f"{Job.State.Name(job.state).removeprefix('STATE_')}: {job.error.message}",
                reason="SHOWCASE_JOB_FAILED",
            )
        return job

    # The evaluation

    def _evaluation(self, train: str, heldout: str, job: Job) -> Evaluation:
        """The succeeded evaluation of the untuned models and the tuned one, on held-out rows. Raises
        FailedPrecondition when it ends otherwise; the next run then makes another."""
        if known := self._progress.get("evaluated"):
            return self._graft.evaluation(known)
        plan = self._plan
        contestants: list[tuple[str, int]] = [(self._large, 0)]
        if plan.shots:
            contestants.append((self._large, plan.shots))
        if self._base != self._large:
            contestants.append((self._base, 0))
        contestants.append((job.fine_tuned_model, 0))
        options: EvaluationOptions = {
            "metrics": plan.metrics,
            "task": plan.task,
            "max_tokens": plan.max_tokens,
            "display_name": plan.title,
            "request_id": self._progress.request_id("evaluation"),
        }
        if plan.shots:
            options["shots_dataset"] = train
        if grader := plan.method_options.get("grader"):
            options["grader"] = grader
        found = self._graft.create_evaluation(heldout, contestants, **options)
        name = found.name
        self._progress.keep("evaluation", short_id(name))
        if found.state in (Evaluation.STATE_QUEUED, Evaluation.STATE_RUNNING):
            self._say(f"evaluation {short_id(found.name)} of {len(contestants)} contestants on held-out rows")
            with self._timed("evaluation") as check:
                told = time.monotonic()
                while found.state in (Evaluation.STATE_QUEUED, Evaluation.STATE_RUNNING):
                    time.sleep(POLL_SECONDS)
                    found = self._graft.evaluation(name)
                    if time.monotonic() - told > 10 and found.total_requests:
                        told = time.monotonic()
                        self._say(f"{found.answered_requests} of {found.total_requests} answered")
                    check(lambda: self._graft.cancel_evaluation(name))
        if found.state != Evaluation.STATE_SUCCEEDED:
            self._progress.forget("evaluation", "evaluation_request")
            raise FailedPrecondition(
                f"Evaluation {short_id(found.name)} of the showcase {plan.name} has ended as "
                f"{Evaluation.State.Name(found.state).removeprefix('STATE_')}: {found.error.message}",
                reason="SHOWCASE_EVALUATION_FAILED",
            )
        return found

    # Time, and the result

    @contextmanager
    def _timed(self, step: str) -> Iterator[Callable[[Callable[[], object]], None]]:
        """Adds the time inside to the step's, also when it is left early. Gives a check that cancels what runs and
        raises FailedPrecondition once all steps together have taken too long."""
        before = sum(self._progress.seconds.values())
        started = time.monotonic()

        def check(cancel: Callable[[], object]) -> None:
            spent = before + time.monotonic() - started
            if spent > LIMIT_SECONDS:
                cancel()
                raise FailedPrecondition(
                    f"The showcase {self._plan.name} has taken {spent / 60:.0f} minutes; {LIMIT_SECONDS / 60:.0f} are "
                    f"its limit. Delete {self._folder / self._name}.json to begin again on a machine with less to do.",
                    reason="SHOWCASE_OVER_TIME",
                )

        try:
            yield check
        finally:
            self._progress.spend(step, time.monotonic() - started)

    def _result(self, job: Job, evaluation: Evaluation, steps: int) -> dict[str, Any]:
        plan, material = self._plan, self._material
        hyperparameters = {
            one["name"]: one["value"] for one in (as_dict(each) for each in job.resolved_hyperparameters)
        }
        return {
            "showcase": plan.name,
            "title": plan.title,
            "asks": plan.asks,
            "caveat": plan.caveat,
            "quick": self._quick,
            "measured": datetime.now(UTC).isoformat(timespec="seconds"),
            "large": self._large,
            "base": self._base,
            "method": plan.method,
            "form": what_it_does(job),
            "task": plan.task,
            "shots": plan.shots,
            "data": {
                "source": material.source,
                "license": material.license,
                "train_rows": len(material.train),
                "heldout_rows": len(material.heldout),
            },
            "training": {
                "model": job.fine_tuned_model,
                "steps": steps,
                "trained_tokens": job.progress.trained_tokens,
                "token_budget": plan.token_budget,
                "hyperparameters": hyperparameters,
                "metrics": dict(job.metrics),
            },
            "seconds": {step: round(seconds, 1) for step, seconds in self._progress.seconds.items()},
            "metrics": list(plan.metrics),
            "results": [as_dict(one) for one in evaluation.results],
            "verdicts": list(evaluation.verdicts),
            "machine": machine(),
            "versions": versions(),
            "commit": commit(),
        }


def _told(value: Any) -> dict[str, Any]:
    """A dataclass as JSON, its functions left out."""
    return {name: each for name, each in dataclasses.asdict(value).items() if not callable(each)}
