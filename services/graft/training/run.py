"""Runs on Ray: a named, detached actor an attempt, which owns the worker group and keeps what it reports.

The actor imports neither torch nor transformers and outlives a restart of whoever started it. Its child actor calls
Ray Train's `TorchTrainer.fit()`; ending the child ends the worker group, since Ray ends what a dead actor owned.
Every report is also a line of `reports.jsonl` in the run's folder.
"""

import json
import os
import threading
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray

from graft.training.spec import ENDS, Report, RunSpec, RunStatus, run_name, run_spec

__all__ = ["RayRuns", "Report", "RunSpec", "RunStatus", "run_spec"]

NAMESPACE = "graft"


class _Run:
    """The run's actor."""

    def __init__(self, spec: RunSpec) -> None:
        self._spec = spec
        self._lock = threading.Lock()
        self._reports: list[Report] = []
        self._folder = Path(spec.output_dir)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._fit: Any = None
        self._thread = threading.Thread(target=self._work, daemon=True)

    def begin(self) -> None:
        """Starts training; a second call does nothing."""
        with self._lock:
            if self._thread.ident is None:
                self._thread.start()

    def tell(self, kind: str, data: dict[str, Any]) -> None:
        """Takes a report from rank 0, or of the run's own end. Nothing follows an end."""
        with self._lock:
            if self._reports and self._reports[-1].kind in ENDS:
                return
            report = Report(len(self._reports) + 1, kind, time.time(), data)
            with open(self._folder / "reports.jsonl", "a") as file:
                file.write(json.dumps(asdict(report)) + "\n")
            self._reports.append(report)

    def poll(self, after_sequence: int) -> tuple[bool, list[Report]]:
        """Whether it still works, and the reports with a higher sequence."""
        with self._lock:
            ended = bool(self._reports) and self._reports[-1].kind in ENDS
            return not ended, self._reports[after_sequence:]

    def cancel(self) -> None:
        """Ends the worker group at once."""
        self.tell("cancelled", {"message": "Cancelled."})
        if self._fit is not None:
            ray.kill(self._fit)

    def _work(self) -> None:
        try:
            me = ray.get_runtime_context().current_actor
            self._fit = ray.remote(num_cpus=0, max_restarts=0)(_Fit).remote()
            ray.get(self._fit.fit.remote(self._spec, me))
            self.tell(
                "failed", {"code": "INTERNAL", "reason": "NO_RESULT", "message": "The run ended without a result."}
            )
        except Exception as error:  # noqa: BLE001 - whatever ended the run is told, and its trace kept in a file
            (self._folder / "error.log").write_text(traceback.format_exc())
            message = f"{_root(error)} See runs/{self._spec.job_id}/{self._spec.attempt}/error.log."
            self.tell("failed", {"code": "INTERNAL", "reason": "TRAINING_FAILED", "message": message})


class _Fit:
    """Calls Ray Train; a process of its own, so that it can be ended."""

    def fit(self, spec: RunSpec, run: Any) -> None:
        """Blocks until the worker group has ended. Raises what a worker raised."""
        os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        trainer = TorchTrainer(
            _train_loop,
            train_loop_config={"spec": spec, "run": run},
            scaling_config=ScalingConfig(num_workers=spec.num_workers, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(name="ray-train", storage_path=spec.output_dir),
            torch_config=TorchConfig(backend="gloo"),
        )
        trainer.fit()


def _train_loop(config: dict[str, Any]) -> None:
    import ray.train

    from graft.training.worker import run_worker

    context = ray.train.get_context()
    run = config["run"]

    def tell(kind: str, data: dict[str, Any]) -> None:
        # Not awaited step by step; the end is, so that nothing is lost when the worker leaves.
        sent = run.tell.remote(kind, data)
        if kind in ENDS:
            ray.get(sent)

    run_worker(config["spec"], tell, rank=context.get_world_rank(), world_size=context.get_world_size())


def _root(error: BaseException) -> str:
    """The sentence of what really went wrong below Ray's layers of errors."""
    while (inner := getattr(error, "cause", None) or error.__cause__) is not None and inner is not error:
        error = inner
    failures = getattr(error, "worker_failures", None)
    if failures:
        return _root(next(iter(failures.values())))
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[-1] if text else 'no message'}"


class RayRuns:
    """Starts, finds, polls and ends runs. Calls block; Ray must be connected in the namespace `graft`."""

    def start(self, spec: RunSpec) -> None:
        """Starts the run, or finds the one of that name."""
        actor = (
            ray.remote(_Run)
            .options(
                name=spec.name,
                namespace=NAMESPACE,
                lifetime="detached",
                get_if_exists=True,
                num_cpus=0,
                max_concurrency=8,
            )
            .remote(spec)
        )
        ray.get(actor.begin.remote())

    def poll(self, job_id: str, attempt: int, after_sequence: int) -> RunStatus:
        """Reports with a higher sequence. `exists` is False when there is no such actor, or it has died."""
        actor = self._find(job_id, attempt)
        if actor is None:
            return RunStatus(False, False, [])
        try:
            alive, reports = ray.get(actor.poll.remote(after_sequence), timeout=30)
        except ray.exceptions.RayActorError:
            return RunStatus(False, False, [])
        return RunStatus(True, alive, reports)

    def cancel(self, job_id: str, attempt: int) -> None:
        """Ends the worker group; the run's last report is `cancelled`. Does nothing when there is no such run."""
        actor = self._find(job_id, attempt)
        if actor is not None:
            ray.get(actor.cancel.remote(), timeout=30)

    def release(self, job_id: str, attempt: int) -> None:
        """Ends the actor and all that it owns. Its folder stays."""
        actor = self._find(job_id, attempt)
        if actor is not None:
            ray.kill(actor)

    @staticmethod
    def _find(job_id: str, attempt: int) -> Any:
        try:
            return ray.get_actor(run_name(job_id, attempt), namespace=NAMESPACE)
        except ValueError:
            return None
