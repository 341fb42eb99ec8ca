"""Runs on Ray: a named, detached actor an attempt, which owns the worker group and keeps what it reports.

The actor imports neither torch nor transformers and outlives a restart of whoever started it. Its child actor calls
Ray Train's `TorchTrainer.fit()`, or for a sweep Ray Tune's `Tuner.fit()`; ending the child ends the workers, since Ray
ends what a dead actor owned.
Every report is also a line of `reports.jsonl` in the run's folder.
"""

import json
import re
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray._common.constants import HEAD_NODE_RESOURCE_NAME
from ray.util import list_named_actors

from graft.domain.errors import Aborted, GraftError
from graft.domain.placement import Node
from graft.nodes import nodes
from graft.training.failures import failure
from graft.training.fit import Fit
from graft.training.link import NAMESPACE, Connected, RayLink
from graft.training.places import ERRORS, REPORTS, on_this_host, uri_of
from graft.training.reservations import give_back
from graft.training.search import Search, options
from graft.training.spec import ENDS, Report, RunSpec, RunStatus, run_name, run_spec

__all__ = ["RayRuns", "Report", "RunSpec", "RunStatus", "run_spec"]

ON_HEAD = {"num_cpus": 0, "resources": {HEAD_NODE_RESOURCE_NAME: 0.001}}
"""Of a run's own actors, as Ray Train has it for some of its own. Ray puts an actor that asks for nothing on any node,
which would then stay for it, a GPU's too, and take the run with it when it goes."""
END_SECONDS = 10.0
"""A killed actor is dead within a second; one whose node cannot be reached has its places back with the node."""
ANSWER_SECONDS = 60.0
"""A call answers in milliseconds; the first waits for the actor's process, which on a busy node takes seconds."""


class _Run:
    """The run's actor."""

    def __init__(self, spec: RunSpec) -> None:
        self._spec = spec = on_this_host(spec)
        self._lock = threading.Lock()
        self._reports: list[Report] = []
        self._folder = Path(spec.output_dir)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._fit: Any = None
        self._controller: Any = None
        self._placed = False
        self._thread = threading.Thread(target=self._work, daemon=True)

    def begin(self) -> None:
        """Starts training; a second call does nothing."""
        with self._lock:
            if self._thread.ident is None:
                self._thread.start()

    def tell(self, kind: str, data: dict[str, Any], trace: str = "") -> None:
        """Takes a report from rank 0, a failure from any worker. Nothing follows an end: what came first is why."""
        with self._lock:
            if trace:
                self._write(ERRORS, trace)
            if self._ended():
                return
            report = Report(len(self._reports) + 1, kind, time.time(), data)
            self._reports.append(report)
            self._write(REPORTS, json.dumps(asdict(report)))
            if self._ended() and self._spec.storage is not None:
                threading.Thread(target=self._keep, daemon=True).start()

    def _write(self, name: str, line: str) -> None:
        """For people to read. Who polls has the reports from memory: that the disk is full must not keep a run that
        fails of it from saying so, or its job would be RUNNING for ever."""
        with suppress(OSError), open(self._folder / name, "a") as file:
            file.write(line + "\n")

    def _keep(self) -> None:
        """What is left of the run for people to read. They are no result: a storage that is away has none of them."""
        storage = self._spec.storage
        for name in (REPORTS, ERRORS):
            if storage is not None and (file := self._folder / name).is_file():
                with suppress(GraftError):
                    storage.put_file(file, uri_of(self._spec, file))

    def place(self) -> None:
        """Called by the first worker, or trial, whose process is there."""
        self._placed = True

    def poll(self, after_sequence: int) -> tuple[bool, list[Report], bool]:
        """Whether it still works, the reports with a higher sequence, and whether its workers have nodes."""
        with self._lock:
            return not self._ended(), self._reports[after_sequence:], self._placed

    def led_by(self, controller: Any) -> None:
        """Ray Train's controller, which is about to reserve the workers' places. Raises Aborted RUN_ENDED."""
        with self._lock:
            if self._ended():
                raise Aborted(f"The run {self._spec.name} has ended.", reason="RUN_ENDED")
            self._controller = controller

    def cancel(self) -> None:
        """Ends the worker group at once, and gives its places back."""
        self.tell("cancelled", {"message": "Cancelled."})
        self._end()

    def _end(self) -> None:
        """After the run's last report: from then on no controller can be new here. May be called twice."""
        with self._lock:
            owners = [actor for actor in (self._fit, self._controller) if actor is not None]
        for actor in owners:
            ray.kill(actor)
        for actor in owners:
            # Dead, it has reserved what it ever will.
            with suppress(ray.exceptions.RayError):
                ray.get(actor.__ray_ready__.remote(), timeout=END_SECONDS)
        give_back(self._spec.name)

    def _ended(self) -> bool:
        return bool(self._reports) and self._reports[-1].kind in ENDS

    def _work(self) -> None:
        try:
            me = ray.get_runtime_context().current_actor
            with self._lock:
                if self._ended():
                    return
                kind, how = (Fit, {}) if self._spec.search is None else (Search, options(self._spec))
                self._fit = ray.remote(**ON_HEAD, max_restarts=0, **how)(kind).remote()
            ray.get(self._fit.fit.remote(self._spec, me, time.time()))
            self.tell(
                "failed", {"code": "INTERNAL", "reason": "NO_RESULT", "message": "The run ended without a result."}
            )
        except Exception as error:  # noqa: BLE001 - whatever ended the run is told, and its trace kept in a file
            self.tell("failed", failure(error, self._spec.error_log), traceback.format_exc())
        finally:
            self._end()


class RayRuns:
    """Starts, finds, polls and ends runs, over a connection to Ray. Calls block.

    Each raises ConnectionError while the cluster cannot be reached.
    """

    def __init__(self, link: RayLink | Connected | None = None) -> None:
        """Ray is connected already where there is no `link`."""
        self._link = link or Connected()

    def start(self, spec: RunSpec) -> None:
        """Starts the run, or finds the one of that name. Ends what is left of earlier attempts of the job.

        Raises Aborted ATTEMPT_SUPERSEDED when a later attempt is there.
        """
        self._link.ask(self._start, spec)

    def poll(self, job_id: str, attempt: int, after_sequence: int) -> RunStatus:
        """Reports with a higher sequence. `exists` is False when there is no such actor, or it has died."""
        return self._link.ask(self._poll, job_id, attempt, after_sequence)

    def cancel(self, job_id: str, attempt: int) -> None:
        """Ends the worker group; the run's last report is `cancelled`. Does nothing when there is no such run."""
        self._link.ask(self._cancel, job_id, attempt)

    def release(self, job_id: str, attempt: int) -> None:
        """Ends the actor and all that it owns. Its folder stays."""
        self._link.ask(self._release, job_id, attempt)

    def nodes(self) -> list[Node]:
        """The cluster's, with all that they have, in use too."""
        return self._link.ask(nodes)

    def _start(self, spec: RunSpec) -> None:
        others = [number for number in self._attempts(spec.job_id) if number != spec.attempt]
        if any(number > spec.attempt for number in others):
            raise Aborted(
                f"Attempt {spec.attempt} of job {spec.job_id!r} is superseded by attempt {max(others)}.",
                reason="ATTEMPT_SUPERSEDED",
            )
        for number in others:
            self._release(spec.job_id, number)
        actor = (
            ray.remote(**ON_HEAD, concurrency_groups={"reports": 1})(_Run)
            .options(
                name=spec.name,
                namespace=NAMESPACE,
                lifetime="detached",
                get_if_exists=True,
                max_concurrency=8,
            )
            .remote(spec)
        )
        ray.get(actor.begin.remote(), timeout=ANSWER_SECONDS)

    def _poll(self, job_id: str, attempt: int, after_sequence: int) -> RunStatus:
        actor = self._find(job_id, attempt)
        if actor is None:
            return RunStatus(False, False, [])
        try:
            alive, reports, placed = ray.get(actor.poll.remote(after_sequence), timeout=ANSWER_SECONDS)
        except ray.exceptions.ActorDiedError:  # not one that cannot be reached for the moment, which goes on
            return RunStatus(False, False, [])
        return RunStatus(True, alive, reports, placed)

    def _cancel(self, job_id: str, attempt: int) -> None:
        actor = self._find(job_id, attempt)
        if actor is not None:
            with suppress(ray.exceptions.ActorDiedError):  # gone in between, and with it the workers
                ray.get(actor.cancel.remote(), timeout=ANSWER_SECONDS)
        give_back(run_name(job_id, attempt))

    def _release(self, job_id: str, attempt: int) -> None:
        try:
            self._cancel(job_id, attempt)  # of a run that has ended, only what it has reserved
        finally:
            if (actor := self._find(job_id, attempt)) is not None:
                ray.kill(actor)

    @staticmethod
    def _find(job_id: str, attempt: int) -> Any:
        try:
            return ray.get_actor(run_name(job_id, attempt), namespace=NAMESPACE)
        except ValueError:
            return None

    @staticmethod
    def _attempts(job_id: str) -> list[int]:
        pattern = re.compile(rf"run-{re.escape(job_id)}-(\d+)")
        named = [item["name"] for item in list_named_actors(all_namespaces=True) if item["namespace"] == NAMESPACE]
        return [int(found[1]) for name in named if (found := pattern.fullmatch(name))]
