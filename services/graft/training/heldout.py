"""Held-out data as training goes: measures the loss, ends training that no longer lowers it, keeps the best weights.

Does not know methods (`graft.training.objectives`), files or Ray.
"""

import math
from typing import Any

import torch

from graft.domain.jobs import Method
from graft.training.loop import StepReport
from graft.training.objectives.objective import Group, Objective, measure
from graft.training.sharding import local
from graft.training.spec import RunSpec


class HeldOut:
    """Every worker has one and calls it alike. They decide alike: what is measured is summed over all of them."""

    def __init__(self, spec: RunSpec, model: Any, objective: Objective[Any, Any] | None, group: Group) -> None:
        """`objective` is over the held-out data; None: there is none."""
        self._spec = spec
        self._model = model
        self._objective = objective
        self._group = group
        self._measured: dict[str, float] = {}
        self._last_step = 0
        self._best_step = 0
        self._best_loss = math.inf
        self._best: dict[str, torch.Tensor] = {}
        self._worse = 0
        """Measurements since the best one."""

    def after(self, report: StepReport) -> dict[str, float]:
        """The metrics measured after this step, named `validation_…`; empty when no measurement is due."""
        self._last_step = report.step
        if self._objective is None or not self._due(report):
            return {}
        found = self._measure(self._model, self._objective, report.step, self._group)
        measured = {f"validation_{name}": value for name, value in found.items()}
        loss = found["loss"]
        if self._spec.method is Method.SELF_SUPERVISED:
            measured["validation_perplexity"] = math.exp(loss) if loss < 700 else math.inf  # a float's range
        if not self._spec.early_stopping_patience:
            self._measured = measured
        elif loss < self._best_loss:
            self._measured = measured
            self._best_step, self._best_loss, self._worse = report.step, loss, 0
            # On the CPU, whatever the model is on: beside it and its optimizer there may be no room.
            self._best = {name: value.to("cpu", copy=True) for name, value in self._trained()}
        else:
            self._worse += 1
        return measured

    @property
    def exhausted(self) -> bool:
        """Whether the loss has not fallen for as many measurements as the job's patience allows."""
        return 0 < self._spec.early_stopping_patience <= self._worse

    def restore(self) -> None:
        """With patience, gives the model the weights of the lowest held-out loss."""
        for name, value in self._trained():
            if name in self._best:
                value.copy_(self._best[name])

    @property
    def result(self) -> dict[str, float]:
        """Metrics of the weights that are kept: the best ones with patience, else the last ones."""
        if not self._best:
            return self._measured
        return self._measured | {"best_step": self._best_step, "best_validation_loss": self._best_loss}

    @property
    def summary(self) -> str:
        """How training ended, in a sentence or two."""
        total_steps = self._spec.total_steps
        ended = (
            f"Stopped early at step {self._last_step} of {total_steps}"
            if self._last_step < total_steps
            else "The last step is done"
        )
        if not self._best:
            return f"{ended}."
        return f"{ended}, best at step {self._best_step}: its weights are kept (held-out loss {self._best_loss:.4f})."

    def loss(self, model: Any) -> float:
        """Of another form of the model: by all workers where it is spread over them, else by this one alone. Raises
        ValueError when there is no held-out data."""
        if self._objective is None:
            raise ValueError("There is no held-out data.")
        return self._measure(model, self._objective, self._last_step, self._group.closing)["loss"]

    @staticmethod
    def _measure(model: Any, objective: Objective[Any, Any], step: int, group: Group) -> dict[str, float]:
        return measure(model, objective, objective.gather(step, range(objective.count), group), group)

    def _due(self, report: StepReport) -> bool:
        if report.step == report.total_steps:
            return True
        every = self._spec.eval_steps
        return report.step % every == 0 if every else report.epoch.is_integer()

    def _trained(self) -> list[tuple[str, torch.Tensor]]:
        """What this worker has of the parameters that train."""
        return [(name, local(value.detach())) for name, value in self._model.named_parameters() if value.requires_grad]
