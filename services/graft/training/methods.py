"""What each method reads and which objective it trains on. The one place that tells methods apart in a worker."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from graft.data.prepare import Example, Prepared, prepare
from graft.data.split import Split
from graft.data.tasks.definition import load
from graft.domain.errors import FailedPrecondition
from graft.domain.jobs import Method
from graft.domain.resources import DatasetFormat
from graft.grading.build import build_grader
from graft.internal.engine_client import EngineClient
from graft.internal.token import host_token
from graft.training.batching import batches
from graft.training.objectives.objective import Group, Objective
from graft.training.objectives.preference import Preference, reference_log_probs
from graft.training.objectives.reinforcement import Reinforced
from graft.training.objectives.supervised import Supervised
from graft.training.policies import Policies
from graft.training.rollouts import EngineSampler, Patience
from graft.training.spec import RunSpec, Tell

HELD_OUT_EXAMPLES = 256
"""Held-out loss is measured on the first so many validation examples: its standard error is then a sixteenth of the
spread of single losses, and more would take longer than the steps between."""
HELD_OUT_TOKENS = 65_536
"""And on so many tokens at most, for the same reason: pieces of documents are as long as the context."""
SCORED_SECONDS = 20.0
"""Between two messages about pairs that the reference scores, which takes minutes before the first step."""


def read_data(spec: RunSpec, tokenizer: Any) -> tuple[Prepared, Prepared | None]:
    """What is trained on, and what is held out of it for measurements: a validation data set, a share of the rows, or
    nothing. Raises as `prepare`."""

    task = load(spec.task_definition) if spec.task_definition else None

    def read(path: str, format: DatasetFormat, split: Split | None = None) -> Prepared:
        return prepare(
            Path(path),
            format,
            tokenizer,
            spec.prompt_tokens,
            spec.over_length_policy,
            split,
            method=spec.method,
            loss_on=spec.loss_on,
            task=task,
        )

    if spec.validation_path is not None and spec.validation_format is not None:
        training = read(spec.dataset_path, spec.dataset_format)
        held_out = read(spec.validation_path, spec.validation_format)
    elif spec.validation_fraction:
        fraction = spec.validation_fraction
        training = read(spec.dataset_path, spec.dataset_format, Split(fraction, held_out=False))
        held_out = read(spec.dataset_path, spec.dataset_format, Split(fraction, held_out=True))
    else:
        return read(spec.dataset_path, spec.dataset_format), None
    return training, held_out.within(HELD_OUT_EXAMPLES, HELD_OUT_TOKENS)


def learned_from(spec: RunSpec, data: Prepared) -> Iterator[int]:
    """Indices of the examples or pairs that training will come to; each once."""
    count = data.stats.example_count
    steps = min(spec.total_steps, math.ceil(count / spec.batch_size))  # an epoch has every index
    return chain.from_iterable(batches(count, spec.batch_size, steps, spec.seed))


def objective_of(
    spec: RunSpec, model: Any, data: Prepared, indices: Iterable[int], device: torch.device, group: Group, tell: Tell
) -> Objective[Any, Any]:
    """The method's objective over `data`, of which `indices` will be used; `close` it in the end. `tell` is called on
    rank 0 only.

    `model` is as training begins from it: for preferences it is scored here, by all workers together. Raises, for
    reinforcement, what is wrong with the grader.
    """
    if spec.method is Method.PREFERENCE:
        on_scored = _Scored(tell) if group.rank == 0 else _silent
        reference_N_2 = reference_log_probs(model, data.pairs, indices, device, group, on_scored)
        return Preference(data.pairs, reference_N_2, spec.preference.beta, device)
    if spec.method is Method.REINFORCEMENT:
        return _reinforced(spec, model, data, device, group, tell)
    return Supervised(data.examples, device)


def probe_candidates(objective: Objective[Any, Any], data: Prepared) -> Sequence[Example]:
    """What the result is proven on in the engine: held-out or training data, or what the policy came to say."""
    return objective.latest if isinstance(objective, Reinforced) else data.sequences


def close(objective: Objective[Any, Any]) -> None:
    """Frees what an objective holds outside of this process, whether training has ended well or not."""
    if isinstance(objective, Reinforced):
        objective.close()


def _reinforced(
    spec: RunSpec, model: Any, data: Prepared, device: torch.device, group: Group, tell: Tell
) -> Reinforced:
    asked = spec.reinforcement
    if asked.grader is None or not spec.engine_address:
        raise FailedPrecondition(
            "Reinforcement needs a grader, and the inference service's address to sample from.",
            reason="REINFORCEMENT_INCOMPLETE",
        )
    grader = build_grader(asked.grader)
    patience = Patience(tell if group.rank == 0 else _silent)
    # The token is the node's and no part of what a run is told, which is kept and shown.
    client = EngineClient(spec.engine_address, spec.engine_base, token=host_token()).of(spec.base_model)
    sampler = EngineSampler(client, spec.base_model, asked, patience)
    policies = Policies(spec, model, sampler, group, tell)
    return Reinforced(data.prompts, asked, spec.seed, sampler, policies, grader, patience, device)


class _Scored:
    """Tells how far the reference has come: not more often than anybody wants to read."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._told = time.monotonic()

    def __call__(self, done: int, of: int) -> None:
        if done < of and time.monotonic() - self._told < SCORED_SECONDS:
            return
        self._told = time.monotonic()
        self._tell("message", {"message": f"The reference has scored {done} of {of} pairs."})


def _silent(_first: object, _second: object) -> None:
    """Whom the other workers tell."""
