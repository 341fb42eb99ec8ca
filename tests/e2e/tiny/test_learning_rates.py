"""A sweep through the public door: its trials are told apart, and the best one's adapter is proven and answers."""

from pathlib import Path

import pytest

from graft.cli.trials import trials_of
from graft.client import Graft
from tests.support.tiny_jobs import BASE, sums, write_rows

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def test_a_sweep_registers_its_best_trial_and_says_what_it_chose(graft: Graft, tmp_path: Path) -> None:
    data = graft.upload_dataset(write_rows(tmp_path / "sums.jsonl", sums(40)))
    job = graft.create_job(
        BASE,
        data.name,
        suffix="swept",
        hyperparameters={"max_steps": 12, "batch_size": 8, "validation_fraction": 0.2, "eval_steps": 3},
        sweep={"learning_rates": [0.02, 1e-9], "ranks": [4, 8], "reduction_factor": 2, "max_trials": 3},
    )
    updates = list(graft.watch_job(job.name))
    job = graft.job(job.name)
    assert job.state == job.STATE_SUCCEEDED, job.error.message
    (trials,) = filter(None, (trials_of(update.event) for update in updates))
    assert [trial["trial"] for trial in trials] == [1, 2, 3]
    (best,) = (trial for trial in trials if trial["best"])
    assert best["best_validation_loss"] == min(trial["best_validation_loss"] for trial in trials)
    assert best["learning_rate"] == 0.02
    used = {item.name: item for item in job.resolved_hyperparameters}
    assert used["learning_rate"].value.number_value == 0.02
    assert used["learning_rate"].reason == "Chosen by the sweep among 0.02, 1e-09."
    assert used["lora.rank"].value.number_value == best["rank"]
    assert 1 <= used["sweep.max_concurrent_trials"].value.number_value <= 3
    seen = {update.event.data["trial"] for update in updates if update.event.type == "metrics"}
    assert seen == {1, 2, 3}
    assert job.metrics["validation_loss"] == best["best_validation_loss"]
    assert graft.adapter_version(job.fine_tuned_model).rank == best["rank"]
    assert graft.generate(job.fine_tuned_model, prompt="Number 3?", max_tokens=2)
