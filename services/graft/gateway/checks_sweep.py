"""What the sweep of a job must satisfy before it is stored."""

from collections.abc import Iterator, Sequence

from graft.domain.errors import FieldViolation
from graft.domain.jobs import JobSpec, Method, Sweep

MOST_VALUES = 32
"""Of a list: a grid of 1024 trials is more than a small search."""
RANGES: dict[str, tuple[float, float]] = {
    # Two trials at least, or there is nothing to choose.
    "max_trials": (2, MOST_VALUES * MOST_VALUES),
    "grace_steps": (1, 10_000_000),
    # 2 halves the trials at each rung; more than 16 would end all but one at the first.
    "reduction_factor": (2, 16),
    "max_concurrent_trials": (1, 1024),
}


def check_sweep(spec: JobSpec, highest_rank: int, loads_as_it_is: bool) -> Iterator[FieldViolation]:
    """Every fault. `highest_rank` is the engine's; `loads_as_it_is`: it loads what the job trains without a change."""
    sweep, asked = spec.sweep, spec.hyperparameters
    if sweep is None:
        return
    yield from _check_values(sweep, highest_rank)
    if not loads_as_it_is or spec.lora.base_quantization:
        yield FieldViolation(
            "sweep",
            "saves an adapter whenever the held-out loss is the lowest so far, which only LoRA that is served as it "
            "is can do: leave out use_dora, modules_to_save and base_quantization, and tune by lora",
        )
    if spec.method is Method.REINFORCEMENT:
        yield FieldViolation("sweep", "is judged by the held-out loss, and reinforcement learns from rewards")
    elif spec.validation_dataset is None and not asked.validation_fraction:
        yield FieldViolation(
            "sweep", "is judged by the held-out loss: give a validation_dataset or a validation_fraction"
        )
    if asked.num_workers is not None and asked.num_workers > 1:
        yield FieldViolation("hyperparameters.num_workers", "must be 1 in a sweep: each of its trials is one worker")
    if sweep.learning_rates:
        for name in ("learning_rate", "learning_rate_multiplier"):
            if getattr(asked, name) is not None:
                yield FieldViolation(
                    f"hyperparameters.{name}", "says nothing beside sweep.learning_rates; leave it out"
                )
    if sweep.ranks and spec.lora.rank:
        yield FieldViolation("lora.rank", "says nothing beside sweep.ranks; leave it out")
    if sweep.ranks and spec.from_adapter is not None:
        yield FieldViolation("sweep.ranks", "cannot be tried from an adapter, which has its rank; leave them out")


def _check_values(sweep: Sweep, highest_rank: int) -> Iterator[FieldViolation]:
    for name in ("learning_rates", "ranks"):
        if (count := len(getattr(sweep, name))) > MOST_VALUES:
            yield FieldViolation(f"sweep.{name}", f"has {count} values; {MOST_VALUES} are allowed")
            return
    yield from _check_list("learning_rates", sweep.learning_rates)
    yield from _check_list("ranks", sweep.ranks)
    for index, rate in enumerate(sweep.learning_rates):
        if not 0 < rate <= 1:
            yield FieldViolation(f"sweep.learning_rates[{index}]", f"{rate} is outside (0, 1]")
    for index, rank in enumerate(sweep.ranks):
        if not 1 <= rank <= highest_rank:
            yield FieldViolation(
                f"sweep.ranks[{index}]", f"{rank} cannot be loaded by the inference service: use 1 to {highest_rank}"
            )
    if len(sweep.learning_rates) * len(sweep.ranks) == 1 or len(sweep.learning_rates) + len(sweep.ranks) == 1:
        yield FieldViolation("sweep", "has one combination; name two learning rates or two ranks, or leave both out")
    for name, (least, most) in RANGES.items():
        value = getattr(sweep, name)
        if value and not least <= value <= most:
            yield FieldViolation(f"sweep.{name}", f"{value:g} is outside [{least}, {most}]")


def _check_list(name: str, values: Sequence[float]) -> Iterator[FieldViolation]:
    for index, value in enumerate(values):
        if value in values[:index]:
            yield FieldViolation(f"sweep.{name}[{index}]", f"{value:g} is named twice")
