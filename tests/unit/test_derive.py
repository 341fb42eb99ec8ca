from dataclasses import replace
from typing import Any

import pytest

from graft.data.prepare import DataStats
from graft.domain.jobs import Hyperparameters, JobSpec, Lora, OverLengthPolicy, Resolved
from graft.domain.resources import BaseModel
from graft.training.derive import derive

BASE = BaseModel("b", "/b", "sha256:b", 135_000_000, 1, 2048, "MIT", "folder", ("q_proj", "v_proj"), 64)


def _resolved(rows: int = 400, base: BaseModel = BASE, lora: Lora | None = None, **asked: Any) -> dict[str, Resolved]:
    stats = DataStats(rows + 3, rows, rows * 40, rows * 2, 60, 40, 3)
    spec = JobSpec("b", "ds", lora=lora or Lora(), hyperparameters=Hyperparameters(**asked))
    return {item.name: item for item in derive(spec, base, stats)}


def _values(found: dict[str, Resolved], *names: str) -> list[Any]:
    return [found[name].value for name in names]


def test_every_hyperparameter_is_derived_with_a_reason() -> None:
    found = _resolved()
    lora = {"lora.rank", "lora.alpha", "lora.dropout", "lora.target_modules"}  # the rest is only told when it is asked
    names = set(Hyperparameters.__dataclass_fields__) | lora
    assert set(found) == names
    assert all(
        item.reason.endswith(".") and any(c.isdigit() for c in item.reason) for item in found.values() if item.derived
    )
    assert _values(found, "learning_rate", "max_steps", "epochs", "batch_size") == [5e-4, 100, 2.0, 8]
    assert _values(found, "lora.rank", "lora.alpha", "lora.dropout") == [8, 16.0, 0.0]
    assert found["lora.target_modules"].value == ["q_proj", "v_proj"]
    assert "3 of 403 rows" in found["over_length_policy"].reason


def test_what_is_given_is_kept_and_the_rest_follows_from_it() -> None:
    found = _resolved(lora=Lora(rank=16), epochs=2.0, batch_size=4, learning_rate=1e-4)
    for name, value in (("epochs", 2.0), ("batch_size", 4), ("learning_rate", 1e-4), ("lora.rank", 16)):
        assert (found[name].value, found[name].derived) == (value, False)
    assert _values(found, "max_steps", "lora.alpha") == [200, 32.0]
    assert found["max_steps"].derived


def test_given_steps_rule_and_the_epochs_follow() -> None:
    assert _values(_resolved(max_steps=25), "max_steps", "epochs") == [25, 0.5]
    assert _values(_resolved(max_steps=25, epochs=3.0), "max_steps", "epochs") == [25, 3.0]
    assert _values(_resolved(epochs=0.1), "max_steps") == [5]


@pytest.mark.parametrize(
    ("rows", "batch_size", "epochs", "steps"),
    [(1, 1, 5.0, 5), (5, 5, 5.0, 5), (100, 8, 5.0, 65), (1000, 8, 1.0, 125), (10_000, 32, 1.0, 313)],
)
def test_few_rows_get_more_epochs_and_a_batch_that_fits(rows: int, batch_size: int, epochs: float, steps: int) -> None:
    assert _values(_resolved(rows), "batch_size", "epochs", "max_steps") == [batch_size, epochs, steps]


def test_larger_bases_get_lower_learning_rates_within_bounds() -> None:
    rates = [
        _resolved(base=replace(BASE, parameter_count=count))["learning_rate"].value
        for count in (0, 10**6, 135 * 10**6, 1_700 * 10**6, 10**15)
    ]
    assert rates == [5e-4, 5e-4, 5e-4, 2.7e-4, 5e-5]


def test_a_multiplier_scales_the_derived_learning_rate_and_its_reason_says_so() -> None:
    large = replace(BASE, parameter_count=1_700 * 10**6)
    for base, multiplier, rate in ((BASE, 2.0, 1e-3), (BASE, 0.1, 5e-5), (large, 2.0, 5.4e-4)):
        found = _resolved(base=base, learning_rate_multiplier=multiplier)
        assert found["learning_rate"].value == pytest.approx(rate)
        assert found["learning_rate"].derived
        assert f"multiplied by {multiplier:g} as the job asks" in found["learning_rate"].reason
        assert (found["learning_rate_multiplier"].value, found["learning_rate_multiplier"].derived) == (
            multiplier,
            False,
        )
    assert "multiplied" not in _resolved()["learning_rate"].reason


def test_the_policy_is_told_with_the_rows_it_meets() -> None:
    found = _resolved(over_length_policy=OverLengthPolicy.TRUNCATE)["over_length_policy"]
    assert (found.value, found.derived) == ("truncate", False)
