"""A sweep's grid, what its trials come to, and which jobs may have one."""

import math
from dataclasses import replace
from typing import Any

import pytest

from graft.data.prepare import DataStats
from graft.domain.errors import InvalidArgument
from graft.domain.jobs import Hyperparameters, JobSpec, Lora, Method, Resolved, Sweep
from graft.domain.resources import BaseModel
from graft.gateway.checks_sweep import check_sweep
from graft.training.derive import derive
from graft.training.sweep import Ledger, SearchSpec, Trial, choose, search_spec

BASE = BaseModel("b", "/b", "sha256:b", 135_000_000, 1, 2048, "MIT", "folder", ("q_proj", "v_proj"), 64)


def _resolved(sweep: Sweep, lora: Lora | None = None, **asked: Any) -> tuple[Resolved, ...]:
    spec = JobSpec("b", "ds", lora=lora or Lora(), hyperparameters=Hyperparameters(**asked), sweep=sweep)
    return derive(spec, BASE, DataStats(400, 400, 16_000, 800, 60, 40, 0))


def _by_name(resolved: tuple[Resolved, ...]) -> dict[str, Resolved]:
    return {item.name: item for item in resolved}


def test_a_grid_has_every_combination_with_an_alpha_of_twice_its_rank() -> None:
    resolved = _resolved(Sweep((1e-4, 5e-4), (4, 16)))
    trials = search_spec(resolved).trials
    assert trials == (
        Trial(1, 1e-4, 4, 8.0),
        Trial(2, 5e-4, 4, 8.0),
        Trial(3, 1e-4, 16, 32.0),
        Trial(4, 5e-4, 16, 32.0),
    )
    found = _by_name(resolved)
    assert (found["sweep.max_trials"].value, found["sweep.max_trials"].derived) == (4, True)
    assert found["sweep.learning_rates"].value == [1e-4, 5e-4]
    assert not found["sweep.learning_rates"].derived
    assert found["learning_rate"].reason == "The sweep chooses among 0.0001, 0.0005."


def test_an_alpha_that_is_given_is_that_of_every_trial() -> None:
    trials = search_spec(_resolved(Sweep((), (4, 16)), Lora(alpha=20.0))).trials
    assert [(trial.learning_rate, trial.rank, trial.alpha) for trial in trials] == [(5e-4, 4, 20.0), (5e-4, 16, 20.0)]


def test_a_sweep_of_nothing_named_tries_rates_around_the_derived_one() -> None:
    trials = search_spec(_resolved(Sweep())).trials
    assert [trial.learning_rate for trial in trials] == [1.7e-4, 5e-4, 1.5e-3]
    assert {trial.rank for trial in trials} == {8}
    around = search_spec(_resolved(Sweep(), learning_rate=0.612)).trials
    assert [trial.learning_rate for trial in around] == [0.2, 0.612, 1.0]
    highest = search_spec(_resolved(Sweep(), learning_rate=1.0)).trials
    assert [trial.learning_rate for trial in highest] == [0.33, 1.0]


def test_of_a_larger_grid_the_seed_draws_as_many_trials_as_are_allowed() -> None:
    sweep = Sweep(tuple(n / 1000 for n in range(1, 11)), (1, 2, 4))
    assert len(search_spec(_resolved(sweep)).trials) == 16
    few = replace(sweep, max_trials=5)
    drawn = [search_spec(_resolved(few, seed=seed)).trials for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert [trial.number for trial in drawn[0]] == [1, 2, 3, 4, 5]
    assert len({(trial.learning_rate, trial.rank) for trial in drawn[0]}) == 5


def test_trials_are_measured_in_quarters_and_none_is_ended_before_the_first() -> None:
    found = _by_name(_resolved(Sweep((1e-4, 5e-4)), max_steps=50))
    assert (found["eval_steps"].value, found["sweep.grace_steps"].value) == (13, 13)
    given = _by_name(_resolved(Sweep((1e-4, 5e-4), grace_steps=20), max_steps=50, eval_steps=5))
    assert (given["eval_steps"].value, given["sweep.grace_steps"].value) == (5, 20)
    search = search_spec(_resolved(Sweep((1e-4, 5e-4))))
    assert (search.reduction_factor, search.max_concurrent_trials) == (3.0, 1)


def test_what_was_chosen_is_told_as_used_and_where_it_is_from() -> None:
    resolved = _resolved(Sweep((1e-4, 5e-4), (4, 16)))
    found = _by_name(choose(resolved, {"learning_rate": 5e-4, "lora.rank": 16.0, "lora.alpha": 32.0}))
    assert found["learning_rate"] == Resolved("learning_rate", 5e-4, True, "Chosen by the sweep among 0.0001, 0.0005.")
    assert found["lora.rank"] == Resolved("lora.rank", 16, True, "Chosen by the sweep among 4, 16.")
    assert isinstance(found["lora.rank"].value, int)
    assert found["lora.alpha"].value == 32.0
    only_rates = _by_name(choose(_resolved(Sweep((1e-4, 5e-4))), {"learning_rate": 1e-4, "lora.rank": 8}))
    assert only_rates["lora.rank"].reason.startswith("8 (Hu")


def _ledger(count: int = 3) -> Ledger:
    trials = tuple(Trial(number, number / 1000, 4, 8.0) for number in range(1, count + 1))
    return Ledger(SearchSpec(trials, 5, 3.0, 2), total_steps=10)


def _step(step: int, loss: float = 1.0) -> dict[str, Any]:
    return {"step": step, "total_steps": 10, "loss": loss, "tokens_per_second": 50.0, "trained_tokens": step * 100}


def _saved(loss: float, step: int) -> dict[str, Any]:
    return {"validation_loss": loss, "step": step, "folder": f"step-{step}", "train_loss": loss + 1}


def test_the_best_trial_is_that_of_the_lowest_held_out_loss_however_it_ended() -> None:
    ledger = _ledger()
    for number, losses in ((1, (0.9, 0.8)), (2, (0.7,)), (3, ())):
        ledger.told(number, "started", {})
        ledger.told(number, "metrics", _step(5))
        for at, loss in enumerate(losses):
            ledger.told(number, "saved", _saved(loss, 5 * (at + 1)))
    ledger.told(1, "finished", {})
    (ended,) = ledger.ended(2)
    (failed,) = ledger.told(3, "failed", {"message": "Training diverged.", "code": "FAILED_PRECONDITION"})
    assert ended[1]["message"].startswith("Trial 2 of 3 ends early at step 5 of 10: held-out loss 0.7000 at step 5")
    assert failed[1]["level"] == "warn"
    assert failed[1]["message"].endswith("the others go on: Training diverged.")
    winner = ledger.winner()
    assert winner is not None
    assert (winner[0].number, winner[1]) == (2, "step-5")
    result = ledger.result()
    assert (result["best_trial"], result["validation_loss"], result["train_loss"]) == (2, 0.7, 1.7)
    assert result["chosen"] == {"learning_rate": 0.002, "lora.rank": 4, "lora.alpha": 8.0}
    assert [(line["state"], line["best_validation_loss"]) for line in result["trials"]] == [
        ("finished", 0.8),
        ("ended_early", 0.7),
        ("failed", None),
    ]


def test_a_trial_ends_once_and_says_nothing_afterwards() -> None:
    ledger = _ledger()
    ledger.told(1, "started", {})
    assert len(ledger.told(1, "finished", {})) == 1
    assert ledger.ended(1) == []
    assert ledger.lost(1, {"message": "Killed."}) == []
    assert ledger.told(1, "metrics", _step(10)) == []


def test_a_metrics_report_tells_its_trial_and_how_far_all_are() -> None:
    ledger = _ledger(2)
    ledger.told(1, "metrics", _step(4))
    ((kind, data),) = ledger.told(2, "metrics", _step(2, 0.5))
    assert (kind, data["trial"], data["step"], data["total_steps"]) == ("metrics", 2, 2, 10)
    whole = data["sweep"]
    assert (whole["step"], whole["total_steps"], whole["loss"], whole["trained_tokens"]) == (6, 20, 0.5, 600)
    assert whole["tokens_per_second"] == 100.0
    ledger.ended(1)  # what it leaves undone needs no time
    ((_, data),) = ledger.told(2, "metrics", _step(3))
    assert (data["sweep"]["step"], data["sweep"]["tokens_per_second"]) == (13, 50.0)


def test_when_no_trial_was_measured_the_sweep_fails_as_the_first_one_did() -> None:
    ledger = _ledger(2)
    for number in (1, 2):
        ledger.told(number, "failed", {"code": "INVALID_ARGUMENT", "reason": "NO_EXAMPLES", "message": "No rows."})
    assert ledger.winner() is None
    with pytest.raises(InvalidArgument, match=r"^None of the 2 trials .* Trial 1: No rows\.$") as raised:
        ledger.result()
    assert raised.value.reason == "NO_EXAMPLES"


def _faults(sweep: Sweep, loads_as_it_is: bool = True, **changes: Any) -> dict[str, str]:
    held_out = Hyperparameters(validation_fraction=0.1)
    spec = JobSpec(**{"base_model": "b", "training_dataset": "ds", "hyperparameters": held_out, **changes}, sweep=sweep)
    return {fault.field: fault.description for fault in check_sweep(spec, 64, loads_as_it_is)}


GOOD = Sweep((1e-4, 5e-4), (4, 8))


def test_a_sweep_that_can_be_run_has_no_fault() -> None:
    assert _faults(GOOD) == _faults(Sweep()) == _faults(Sweep(ranks=(4, 8))) == {}
    by_dataset = {"hyperparameters": Hyperparameters(num_workers=1), "validation_dataset": "ds-2"}
    assert _faults(replace(GOOD, max_trials=2, grace_steps=1, reduction_factor=2.5), **by_dataset) == {}


@pytest.mark.parametrize(
    ("sweep", "changes", "field", "told"),
    [
        (Sweep((0.0, 2.0)), {}, "sweep.learning_rates[1]", "outside (0, 1]"),
        (Sweep((math.nan, 0.1)), {}, "sweep.learning_rates[0]", "outside (0, 1]"),
        (Sweep((1e-4, 1e-4)), {}, "sweep.learning_rates[1]", "named twice"),
        (Sweep(ranks=(4, 65)), {}, "sweep.ranks[1]", "1 to 64"),
        (Sweep(ranks=tuple(range(1, 34))), {}, "sweep.ranks", "33 values"),
        (Sweep((1e-4,)), {}, "sweep", "one combination"),
        (Sweep((1e-4,), (4,)), {}, "sweep", "one combination"),
        (replace(GOOD, max_trials=1), {}, "sweep.max_trials", "outside [2"),
        (replace(GOOD, reduction_factor=1.0), {}, "sweep.reduction_factor", "outside [2"),
        (replace(GOOD, reduction_factor=math.nan), {}, "sweep.reduction_factor", "outside [2"),
        (replace(GOOD, grace_steps=-1), {}, "sweep.grace_steps", "outside [1"),
        (GOOD, {"hyperparameters": Hyperparameters()}, "sweep", "give a validation_dataset"),
        (GOOD, {"method": Method.REINFORCEMENT}, "sweep", "rewards"),
        (GOOD, {"lora": Lora(base_quantization="nf4")}, "sweep", "base_quantization"),
        (GOOD, {"lora": Lora(rank=4)}, "lora.rank", "sweep.ranks"),
        (GOOD, {"from_adapter": "b:a@1"}, "sweep.ranks", "has its rank"),
        (GOOD, {"hyperparameters": Hyperparameters(validation_fraction=0.1, num_workers=2)}, None, "must be 1"),
        (GOOD, {"hyperparameters": Hyperparameters(validation_fraction=0.1, learning_rate=0.1)}, None, "leave it out"),
    ],
)
def test_a_sweep_that_cannot_be_run_is_refused_with_the_field(
    sweep: Sweep, changes: dict[str, Any], field: str | None, told: str
) -> None:
    faults = _faults(sweep, **changes)
    field = field or next(name for name in faults if name.startswith("hyperparameters."))
    assert told in faults[field]


def test_a_sweep_of_what_the_engine_does_not_load_as_it_is_is_refused() -> None:
    assert "served as it is" in _faults(GOOD, loads_as_it_is=False)["sweep"]
