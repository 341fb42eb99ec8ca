"""A base spread over two workers, asked for at the public door: its adapter is proven in the engine and answers."""

from pathlib import Path

import pytest

from graft.client import Graft
from tests.support.tiny_jobs import BASE, sums, write_rows

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def test_an_adapter_that_trained_over_a_spread_base_is_served(graft: Graft, tmp_path: Path) -> None:
    data = graft.upload_dataset(write_rows(tmp_path / "sums.jsonl", sums(40)))
    asked = {"max_steps": 6, "batch_size": 8, "num_workers": 2, "sharding": "SHARDING_ALWAYS"}
    job = graft.create_job(BASE, data.name, suffix="spread", hyperparameters=asked)
    told = [update.event.message for update in graft.watch_job(job.name)]
    job = graft.job(job.name)
    assert job.state == job.STATE_SUCCEEDED, job.error.message
    assert any("with 2 workers" in message and "blocks spread over them" in message for message in told), told
    (used,) = (item for item in job.resolved_hyperparameters if item.name == "sharding")
    assert (used.value.string_value, used.derived) == ("always", False)
    assert graft.generate(job.fine_tuned_model, prompt="Number 3?", max_tokens=2)
