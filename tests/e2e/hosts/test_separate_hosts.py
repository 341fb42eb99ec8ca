"""On six hosts: trained across two, served from two, and what becomes of it when a cable is pulled or a host dies.

In this order, since the last test kills a host.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from graft.api.v1 import fine_tuning_job_pb2
from graft.domain.errors import Unavailable
from tests.support.healing import Note
from tests.support.host_cluster import BASE, HostCluster, patient, seconds_until
from tests.support.host_jobs import alive, ask, create, succeeded, told, trains, versions
from tests.support.processes import held, slowed
from tests.support.whole_stack import eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(580)]

SHORT_CUT_SECONDS = 8.0
"""Less than Ray waits for a host."""
TRAINING_SECONDS, HELD_SECONDS = 0.05, 0.45
"""In turn."""
BESIDE_BYTES = 60_000_000
WORKER, REPLICA = "RayTrainWorker", "ServeReplica:graft-engine"


def last_used(cluster: HostCluster, model: str) -> dict[str, float]:
    """When each replica last used a version that it holds."""
    return {
        replica.replica: held.last_use_time.ToNanoseconds() / 1e9
        for replica in cluster.replicas()
        for held in replica.adapters
        if held.model == model and held.tier == held.TIER_ENGINE
    }


def both_answer(cluster: HostCluster, model: str) -> None:
    """Asks until each of two replicas has answered, always the same."""
    before = eventually(lambda: last_used(cluster, model), lambda held: len(held) == 2, 120, f"two hold {model}")
    answers: set[str] = set()

    def asked() -> dict[str, float]:
        answers.add(cluster.graft.generate(model, prompt="Number 3?", max_tokens=8).text)
        return last_used(cluster, model)

    eventually(
        asked,
        lambda now: len(now) == 2 and all(now[replica] > before.get(replica, 0.0) for replica in now),
        60,
        f"both replicas answer as {model}",
    )
    assert len(answers) == 1, answers


def test_two_hosts_train_what_two_replicas_on_two_hosts_answer_with(cluster: HostCluster, dataset: str) -> None:
    assert cluster.hosts_with(REPLICA) == {"head", "node"}
    name = create(cluster, dataset, "sums")
    trained: set[str] = set()

    def look() -> fine_tuning_job_pb2.FineTuningJob:
        trained.update(cluster.hosts_with(WORKER))
        return alive(cluster, name)

    job = eventually(look, lambda job: job.state == job.STATE_SUCCEEDED, 400, "the job succeeds")
    assert trained == {"head", "node"}
    assert job.fine_tuned_model == f"{BASE}:sums@1"
    assert job.attempt == 1
    both_answer(cluster, job.fine_tuned_model)
    for host in ("head", "node"):  # each has fetched for itself
        disk = cluster.host(host).disk
        assert list(disk.glob("home/cache/adapters/*/adapter_model.safetensors"))
        assert list(disk.glob("home/cache/storage/*.jsonl"))
    assert list(cluster.host("node").disk.glob("home/cache/base_models/fetched-*/config.json"))
    assert not list(cluster.host("gate").disk.rglob("*.safetensors"))


def test_a_stream_whose_link_is_cut_ends_with_an_error_and_the_next_is_answered(
    cluster: HostCluster, note: Note
) -> None:
    gate, head = cluster.host("gate"), cluster.host("head")
    cores = cluster.engine_cores()
    pieces = iter(
        cluster.openai.completions.create(
            model=BASE, prompt="a", max_tokens=500, stream=True, timeout=120, extra_body={"ignore_eos": True}
        )
    )
    next(pieces)
    # A tiny model writes the rest faster than a link is cut.
    with held(cores), gate.apart_from(head):
        cut = time.monotonic()
        with pytest.raises(openai.APIError) as caught:
            list(pieces)  # the whole answer would be no error: half of it must not look whole
        error_seconds = time.monotonic() - cut
        with pytest.raises(Unavailable) as refused:
            ask(cluster)
    assert caught.value.code == "engine_lost"
    assert refused.value.reason == "ENGINE_STARTING"
    heal_seconds = seconds_until(lambda: ask(cluster), 60, "the gateway answers again")
    note(
        "gateway from inference, in a stream",
        error_seconds=error_seconds,
        told="ENGINE_LOST",
        heal_seconds=heal_seconds,
    )


def test_an_adapter_whose_download_is_cut_is_refused_as_unavailable_and_then_served(
    cluster: HostCluster, note: Note
) -> None:
    store, engines = cluster.host("store"), [cluster.host("head"), cluster.host("node")]
    cluster.publish("heavy", BESIDE_BYTES)

    def downloading() -> list[int]:
        return [size for host in engines for size in host.files("home/cache/adapters/.pull-*/**").values()]

    def generate() -> Any:
        return cluster.graft.generate(f"{BASE}:heavy@1", prompt="Number 3?", max_tokens=4)

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(generate)

        def begun() -> list[int]:
            assert not asked.done(), f"no download: {asked.exception() or asked.result()!r}"
            return downloading()

        eventually(begun, any, 60, "the download begins")
        with store.apart_from(*engines):
            cut = time.monotonic()
            with pytest.raises(Unavailable) as caught:
                asked.result(240)
            error_seconds = time.monotonic() - cut
            assert downloading() == []  # no half adapter stays behind
            ask(cluster)  # the base needs nothing of the registry
    assert caught.value.reason == "REGISTRY_UNAVAILABLE"
    heal_seconds = seconds_until(generate, 120, "the adapter is served")
    told = caught.value.reason
    note("replicas from MLflow, in a download", error_seconds=error_seconds, told=told, heal_seconds=heal_seconds)


def test_a_job_only_waits_while_its_host_and_then_its_orchestrator_are_cut_off(
    cluster: HostCluster, dataset: str, note: Note
) -> None:
    name = create(cluster, dataset, "cut")
    trains(cluster, name)
    # Else a quick machine's job may be over before its orchestrator is cut off.
    with slowed(cluster.training_workers(), TRAINING_SECONDS, HELD_SECONDS):
        for host, what in (("node", "a training host"), ("orch", "the orchestrator")):
            cluster.host(host).cut()
            time.sleep(SHORT_CUT_SECONDS)
            before = alive(cluster, name)
            cluster.host(host).heal()
            healed = time.monotonic()
            goes_on(cluster, name, before)
            what = f"{what} from all others, for {SHORT_CUT_SECONDS:.0f} s"
            note(what, error_seconds=None, told="the job waits", heal_seconds=time.monotonic() - healed)
    job = succeeded(cluster, name)
    assert job.attempt == 1
    assert versions(cluster, "cut") == ["1"]


def goes_on(cluster: HostCluster, name: str, before: fine_tuning_job_pb2.FineTuningJob) -> None:
    eventually(
        lambda: alive(cluster, name),
        lambda job: (job.progress.step, job.state) != (before.progress.step, before.state),
        120,
        f"{name} goes on",
    )


def test_a_host_that_dies_costs_no_job_and_no_version_and_comes_back(
    cluster: HostCluster, dataset: str, note: Note
) -> None:
    node = cluster.host("node")
    cluster.publish("beside", 0)
    name = create(cluster, dataset, "killed")
    trains(cluster, name)
    with held(cluster.training_workers()):
        node.kill()
    killed = time.monotonic()
    serving_seconds = seconds_until(lambda: ask(cluster), 120, "the other replica answers")
    queued = eventually(lambda: alive(cluster, name), lambda job: job.attempt == 2, 300, "the job is tried again")
    noticed_seconds = time.monotonic() - killed
    eventually(
        lambda: patient(cluster.replicas) or [], lambda found: len(found) == 1, 60, "the one that is left is told"
    )
    assert queued.state != queued.STATE_SUCCEEDED
    node.heal()
    cluster.start_node()
    back = time.monotonic()
    job = succeeded(cluster, name)
    trained_seconds = time.monotonic() - back
    assert job.attempt == 2
    assert versions(cluster, "killed") == ["1"]
    assert any("Trying again." in message for message in told(cluster, name)), told(cluster, name)
    cluster.wait_for_replicas(300)
    replicas_seconds = time.monotonic() - back
    assert cluster.hosts_with(REPLICA) == {"head", "node"}
    for adapter in ("beside", "killed"):
        assert patient(lambda adapter=adapter: cluster.graft.generate(f"{BASE}:{adapter}@1", prompt="a", max_tokens=2))
    note("inference: one of two hosts dead", error_seconds=None, told="the other answers", heal_seconds=serving_seconds)
    note("a training host dead", error_seconds=noticed_seconds, told="attempt 2", heal_seconds=trained_seconds)
    note("a dead host's replica", error_seconds=None, told="the other answers", heal_seconds=replicas_seconds)
