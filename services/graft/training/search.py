"""Runs a sweep's trials through Ray Tune, in a process of its own that can be ended, and keeps the best adapter.

Each trial is an actor that reserves what a worker does, and does a worker's whole work alone
(`graft.training.worker`). Ray Tune places the trials and asks ASHA (Li et al. 2018, arXiv:1810.05934) which of them to
end. Ending this process ends them all.
"""

import math
import os
import shutil
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray

from graft.domain.errors import Unavailable
from graft.training.failures import failure
from graft.training.fit import bundle, free_threads, worker_environment
from graft.training.places import on_this_host, patiently, put, ray_storage, remove
from graft.training.reservations import trial_name
from graft.training.spec import Clock, RunSpec, Tell
from graft.training.sweep import Ledger, SearchSpec, Tells, Trial

ENVIRONMENT = {
    # What happens is in the run's reports: no files of Tune's own loggers.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # A trial that ends before its first measurement tells Tune nothing, which is no error here.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}
METRIC = "validation_loss"


def options(spec: RunSpec) -> dict[str, Any]:
    """Of the actor, whose class is `Search`."""
    return {
        "concurrency_groups": {"reports": 1},
        # Its trials, as its children, have it too.
        "runtime_env": {"env_vars": worker_environment(spec.demand) | ENVIRONMENT},
    }


class Search:
    """An actor's class: one call of `fit`, one sweep. `report` is called by trials meanwhile."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ledger: Ledger | None = None
        self._run: Any = None

    def fit(self, spec: RunSpec, run: Any, begin_seconds: float) -> None:
        """Blocks until every trial has ended and tells `run` the result. Raises what the first trial failed with when
        none of them came to a measurement."""
        from ray import tune
        from ray.tune.schedulers import ASHAScheduler

        search = _search(spec)
        self._run = run
        self._ledger = ledger = Ledger(search, spec.total_steps)
        me = ray.get_runtime_context().current_actor
        trainable = tune.with_parameters(_trial, spec=spec, search=me, begin_seconds=begin_seconds)
        tune.Tuner(
            tune.with_resources(trainable, lambda config: _place(spec, config["trial"])),
            param_space={"trial": tune.grid_search([trial.number for trial in search.trials])},
            tune_config=tune.TuneConfig(
                scheduler=ASHAScheduler(
                    time_attr="step",
                    metric=METRIC,
                    mode="min",
                    max_t=max(spec.total_steps, search.grace_steps),
                    grace_period=search.grace_steps,
                    reduction_factor=search.reduction_factor,
                    stop_last_trials=False,
                ),
                max_concurrent_trials=search.max_concurrent_trials,
            ),
            run_config=tune.RunConfig(name="ray-tune", callbacks=[_ends(me, spec)], verbose=0, **ray_storage(spec)),
        ).fit()
        with self._lock:
            result = ledger.result()
            winner = ledger.winner()
        if winner is not None:
            _keep(on_this_host(spec), winner[1], lambda kind, data: self._tell([(kind, data)]))
        # As all others, or it would overtake them: nothing follows an end.
        ray.get(run.tell.options(concurrency_group="reports").remote("finished", result))

    def report(self, number: int, kind: str, data: dict[str, Any], trace: str = "") -> None:
        """What a trial tells (`Ledger.told`)."""
        with self._lock:
            if self._ledger is not None:
                self._tell(self._ledger.told(number, kind, data), trace)

    def place(self) -> None:
        """A trial's process is there."""
        self._run.place.options(concurrency_group="reports").remote()

    def ended(self, number: int) -> None:
        """Tune has ended a trial, or it has ended itself."""
        with self._lock:
            if self._ledger is not None:
                self._tell(self._ledger.ended(number))

    def lost(self, number: int, found: dict[str, Any]) -> None:
        """A trial's process has died."""
        with self._lock:
            if self._ledger is not None:
                self._tell(self._ledger.lost(number, found))

    def _tell(self, tells: Tells, trace: str = "") -> None:
        for kind, data in tells:
            self._run.tell.options(concurrency_group="reports").remote(kind, data, trace)


def _place(spec: RunSpec, number: int) -> Any:
    from ray import tune

    selector = {"bundle_label_selector": [dict(spec.demand.labels)]} if spec.demand.labels else {}
    return tune.PlacementGroupFactory([bundle(spec.demand)], name=trial_name(spec.name, number), **selector)


def trial_spec(spec: RunSpec, trial: Trial) -> RunSpec:
    """The run of one trial alone: in a folder of its own, without checkpoints but that of its lowest held-out loss."""
    return replace(
        spec,
        learning_rate=trial.learning_rate,
        lora=replace(spec.lora, rank=trial.rank, alpha=trial.alpha),
        output_dir=str(Path(spec.output_dir) / "trials" / str(trial.number)),
        output_key=f"{spec.output_key}/trials/{trial.number}",
        checkpoint_steps=spec.total_steps + 1,
        # It keeps its best weights; without patience there are fewer measurements than this.
        early_stopping_patience=spec.early_stopping_patience or spec.total_steps + 1,
        search=None,
    )


def _search(spec: RunSpec) -> SearchSpec:
    if spec.search is None:
        raise TypeError("A run without a sweep has no trials.")
    return spec.search


def _ends(search: Any, spec: RunSpec) -> Any:
    """Tune's callback: how each trial has ended. `search` is the actor itself by its handle, since Tune pickles it."""
    from ray.tune import Callback

    class Ends(Callback):  # type: ignore[misc] # Ray has no types
        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            del iteration, trials, info
            ray.get(search.ended.options(concurrency_group="reports").remote(trial.config["trial"]))

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            del iteration, trials, info
            error = trial.get_pickled_error() or RuntimeError("The trial ended without a word.")
            told = failure(error, spec.error_log)
            ray.get(search.lost.options(concurrency_group="reports").remote(trial.config["trial"], told))

    return Ends()


def _trial(config: dict[str, Any], spec: RunSpec, search: Any, begin_seconds: float) -> None:
    """The function of a trial's actor."""
    clock = Clock()
    clock.laps["worker_group"] = round(time.time() - begin_seconds, 3)
    from ray import tune

    from graft.training.objectives.objective import ALONE
    from graft.training.worker import Measured, run_worker

    clock.lap("imports")
    number = config["trial"]
    mine = on_this_host(trial_spec(spec, next(trial for trial in _search(spec).trials if trial.number == number)))
    best_loss = math.inf
    kept: str | None = None

    def tell(kind: str, data: dict[str, Any], trace: str = "") -> None:
        sent = search.report.options(concurrency_group="reports").remote(number, kind, data, trace)
        if kind != "metrics" or METRIC in data:  # what decides must have arrived before the trial can be ended
            ray.get(sent)

    def measured(now: Measured) -> None:
        nonlocal best_loss, kept
        if now.loss < best_loss:
            best_loss = now.loss
            folder = Path(mine.output_dir) / f"step-{now.step}"
            result = now.save(folder)
            where = patiently(partial(put, mine, folder), tell)
            tell("saved", {**now.result, **result, METRIC: now.loss, "step": now.step, "folder": where})
            if kept is not None:
                with suppress(Unavailable):  # then it stays there: an adapter of some megabytes
                    remove(mine, kept)
            kept = where
        if now.step < mine.total_steps:  # after the last there is nothing to end
            tune.report({"step": now.step, METRIC: now.loss})

    os.makedirs(mine.output_dir, exist_ok=True)
    search.place.options(concurrency_group="reports").remote()
    try:
        run_worker(mine, tell, ALONE, partial(free_threads, spec.demand), clock, measured)
    except Exception as error:  # noqa: BLE001 - whatever ended the trial is told, and its trace kept in a file
        tell("failed", failure(error, spec.error_log), traceback.format_exc())


def _keep(spec: RunSpec, where: str, tell: Tell) -> None:
    """Makes a trial's folder the run's result: `adapter` is whole or not there. Waits for a storage that is away."""
    adapter = Path(spec.output_dir) / "adapter"
    temporary = adapter.with_name(".adapter")
    shutil.rmtree(temporary, ignore_errors=True)
    if spec.storage is not None:
        patiently(partial(spec.storage.fetch_folder, where, temporary), tell)
        shutil.rmtree(adapter, ignore_errors=True)
        (temporary / adapter.name).rename(adapter)
        shutil.rmtree(temporary)
        patiently(partial(put, spec, adapter), tell)
        return
    shutil.copytree(Path(where) / adapter.name, temporary)
    shutil.rmtree(adapter, ignore_errors=True)
    temporary.rename(adapter)
