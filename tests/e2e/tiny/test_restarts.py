"""Things end that should not, and things that should: every part is replaced, and no job or adapter is lost.

Also what the stack listens on while everything runs, since a job that trains on two workers is needed here.
"""

import json
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import openai
import psutil
import pytest

from graft.api.v1 import adapter_pb2
from graft.api.v1.fine_tuning_job_pb2 import FineTuningJob
from graft.client import Graft
from graft.stack.processes import http_probe
from tests.support.listeners import listeners
from tests.support.processes import held, slowed
from tests.support.serving_stack import titles
from tests.support.tiny_jobs import BASE, sums, write_rows
from tests.support.whole_stack import WholeStack, eventually

pytestmark = pytest.mark.e2e

STEPS = 300
TRAINING_SECONDS, HELD_SECONDS = 0.05, 0.45
"""In turn, so that a quick machine's run is not over before its orchestrator has been replaced twice."""


def scores(client: openai.OpenAI, model: str) -> list[float]:
    answer = client.completions.create(model=model, prompt="hello", max_tokens=8, temperature=0, logprobs=0)
    assert answer.choices[0].logprobs is not None
    return [value or 0.0 for value in answer.choices[0].logprobs.token_logprobs or []]


def wait_for(graft: Graft, job: str, state: FineTuningJob.State.ValueType) -> None:
    for update in graft.watch_job(job):
        if update.fine_tuning_job.state == state:
            return
    raise AssertionError(f"{job} ended without {FineTuningJob.State.Name(state)}: {graft.job(job)}")


def logged(stack: WholeStack) -> list[dict[str, Any]]:
    """What the orchestrators of this stack have logged."""
    lines = (stack.home / "logs" / "orchestrator.log").read_text().splitlines()
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def adopted(stack: WholeStack, job: str) -> list[str]:
    """The states in which they found the job that was left to them."""
    name = job.rpartition("/")[2]
    return [line["state"] for line in logged(stack) if line["event"] == "job_adopted" and line["job"] == name]


@pytest.fixture(scope="module")
def data(graft: Graft, tmp_path_factory: pytest.TempPathFactory) -> str:
    name: str = graft.upload_dataset(write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", sums(40))).name
    return name


@pytest.fixture(scope="module")
def wide(stack: WholeStack, graft: Graft, data: str) -> str:
    """A job that trains on both cores, and would for ever."""
    job = graft.create_job(BASE, data, hyperparameters={"max_steps": 1_000_000, "num_workers": 2})
    wait_for(graft, job.name, FineTuningJob.STATE_RUNNING)
    assert len(stack.training_workers()) == 2
    return str(job.name)


@pytest.fixture(scope="module")
def waiting(stack: WholeStack, graft: Graft, wide: str, data: str) -> str:
    """A job that could start only when a cancelled one had given back both cores."""
    workers = stack.training_workers()
    job = graft.create_job(BASE, data, suffix="adopted", hyperparameters={"max_steps": STEPS, "batch_size": 4})
    wait_for(graft, job.name, FineTuningJob.STATE_QUEUED)
    assert graft.job(wide).state == FineTuningJob.STATE_RUNNING
    graft.cancel_job(wide)
    *_, last = graft.watch_job(wide)
    assert last.fine_tuning_job.state == FineTuningJob.STATE_CANCELLED
    assert not last.fine_tuning_job.fine_tuned_model
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
    return str(job.name)


@pytest.mark.usefixtures("wide")
def test_everything_listens_on_loopback_only(stack: WholeStack) -> None:
    found = listeners(stack.left())
    for item in found:
        print(f"{item.kind} {item.address}:{item.port}  {item.process}")
    assert len({item.process for item in found}) > 10
    # torch's store, by which the workers of a job find each other: Ray Train has no option for its address.
    open_ones = [item.process.strip() for item in found if not item.on_loopback]
    assert open_ones == ["ray::RayTrainWorker"], open_ones


def test_a_cancelled_job_gives_back_what_it_held_and_the_next_one_runs(graft: Graft, waiting: str) -> None:
    wait_for(graft, waiting, FineTuningJob.STATE_RUNNING)


def test_a_job_outlives_two_orchestrators_one_stopped_and_one_killed_and_its_watch_the_gateway(
    stack: WholeStack, graft: Graft, waiting: str
) -> None:
    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(lambda: list(graft.watch_job(waiting)))
        wait_for(graft, waiting, FineTuningJob.STATE_RUNNING)
        with slowed(stack.training_workers(), TRAINING_SECONDS, HELD_SECONDS):
            stack.end("orchestrator", signal.SIGTERM)
            eventually(lambda: adopted(stack, waiting), lambda states: states == ["RUNNING"], 120, "it is adopted")
            stack.end("orchestrator", signal.SIGKILL)
            stack.end("gateway", signal.SIGKILL)
            stack.ready_again("gateway", restarts=1)
            stack.ready_again("orchestrator", restarts=2)
        updates = watching.result(240)
    job = graft.job(waiting)
    assert job.state == FineTuningJob.STATE_SUCCEEDED, job.error
    assert (job.attempt, job.fine_tuned_model) == (1, "tiny:adopted@1")
    assert [update.event.sequence for update in updates] == list(range(1, len(updates) + 1))
    states = [update.event.data["state"] for update in updates if update.event.type == "state"]
    assert states.count("STARTING") == 1
    reports = [update.event.data["report"] for update in updates if "report" in update.event.data]
    assert reports == sorted(set(reports))
    assert adopted(stack, waiting) == ["RUNNING", "RUNNING"]
    assert sum(line["event"] == "orchestrator_stopped" for line in logged(stack)) == 1


@pytest.mark.usefixtures("trained")
def test_a_killed_engine_is_replaced_and_its_adapters_come_back_by_themselves(
    stack: WholeStack, graft: Graft, client: openai.OpenAI
) -> None:
    before = {model: scores(client, model) for model in ("tiny", "tiny:sums", "tiny:echo")}
    (held,) = graft.residency()
    stack.engine_core().kill()
    (replica,) = eventually(
        graft.residency,
        lambda told: len(told) == 1 and told[0].ready and told[0].engine_restarts == held.engine_restarts + 1,
        120,
        "the engine is replaced",
    )
    assert replica.replica == held.replica
    assert {adapter.model for adapter in replica.adapters} == {adapter.model for adapter in held.adapters}
    assert {adapter.tier for adapter in replica.adapters} == {adapter_pb2.ResidentAdapter.TIER_ENGINE}
    for model, expected in before.items():
        assert scores(client, model) == pytest.approx(expected, abs=1e-3)


@contextmanager
def no_mlflow_starts(stack: WholeStack) -> Iterator[None]:
    """In the block neither what starts MLflow again does anything, nor what it may have started already."""

    def started() -> list[psutil.Process]:
        return [process for process in stack.left() if "graft.registry.main" in " ".join(titles([process]))]

    assert stack.up is not None
    with held([psutil.Process(stack.up.pid)]), held(started()):
        yield


@pytest.mark.usefixtures("trained")
def test_generation_goes_on_while_mlflow_is_gone_and_mlflow_comes_back(
    stack: WholeStack, client: openai.OpenAI
) -> None:
    mlflow_answers = http_probe(f"{stack.settings.tracking_uri}/health")
    assert mlflow_answers()
    stack.end("mlflow", signal.SIGKILL)
    eventually(mlflow_answers, lambda answers: not answers, 10, "MLflow is gone")
    with no_mlflow_starts(stack):
        assert not mlflow_answers()
        for model in ("tiny", "tiny:sums", "tiny:echo@1", "tiny:echo@champion"):
            assert scores(client, model)
    stack.ready_again("mlflow", restarts=1)
