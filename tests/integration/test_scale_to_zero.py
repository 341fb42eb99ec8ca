"""A training cluster that is at zero: a run's request makes Ray's own autoscaler add the node that its labels name."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from graft.domain.placement import Demand, Node, count
from graft.training.run import RayRuns
from graft.training.spec import ENDS
from tests.support.growing_cluster import growing_cluster
from tests.support.run_specs import tiny_run
from tests.support.tiny_llama import make_tiny_llama

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

GROUPS = {
    "plain": {"resources": {"CPU": 4}, "labels": {"pool": "plain"}, "max_workers": 2},
    "large": {"resources": {"CPU": 1, "GPU": 1}, "labels": {"pool": "large"}, "max_workers": 1},
}
ASKED = Demand({"CPU": 1.0, "GPU": 0.5}, {"pool": "large"})


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[RayRuns]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    with growing_cluster(tmp_path, GROUPS) as address:
        ray.init(address=address, namespace="elsewhere", log_to_driver=False)
        yield RayRuns()
        ray.shutdown()


def _training(runs: RayRuns) -> list[Node]:
    return [node for node in runs.nodes() if node.resources.get("CPU")]


def test_a_run_on_a_cluster_at_zero_gets_the_node_that_it_asks_for_and_no_other(runs: RayRuns, tmp_path: Path) -> None:
    assert _training(runs) == []
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n} is ", "completion": "a number"}) + "\n" for n in range(20)))
    spec = tiny_run(make_tiny_llama(tmp_path / "base"), data, tmp_path / "run", total_steps=2, demand=ASKED)
    runs.start(spec)
    status = runs.poll(spec.job_id, 1, 0)
    assert (status.alive, status.placed, status.reports) == (True, False, [])
    deadline = time.monotonic() + 300
    while not (status.reports and status.reports[-1].kind in ENDS):
        assert time.monotonic() < deadline, (tmp_path / "ray.log").read_text()[-4000:]
        time.sleep(0.2)
        status = runs.poll(spec.job_id, 1, 0)
    assert status.reports[-1].kind == "finished", status.reports[-1].data
    assert status.placed
    (node,) = _training(runs)
    assert node.labels["pool"] == "large"
    assert count([node], ASKED) == 1
    runs.release(spec.job_id, 1)
