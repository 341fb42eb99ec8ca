"""Runs on a real Ray cluster of two nodes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from graft.domain.errors import Aborted
from graft.domain.jobs import Lora, Method, Preference, ServedAs, Sharding, Tuning
from graft.domain.resources import DatasetFormat
from graft.training.link import NAMESPACE
from graft.training.run import RayRuns
from graft.training.spec import ENDS, Report, RunSpec
from graft.training.sweep import SearchSpec, Trial
from tests.support.run_specs import tiny_run, validated_on
from tests.support.tiny_llama import make_tiny_llama

pytestmark = [pytest.mark.integration, pytest.mark.ray, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def runs() -> Iterator[RayRuns]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 * 2**20})
    try:
        cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
        # Not `graft`: a run's name must not depend on the namespace that its starter happens to be in.
        ray.init(address=cluster.address, namespace="elsewhere", log_to_driver=False)
        yield RayRuns()
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(autouse=True)
def _nothing_goes_on(runs: RayRuns) -> Iterator[None]:
    """What a test that has failed leaves running would keep its CPUs from all that follow."""
    yield
    from ray.util import list_named_actors

    for actor in list_named_actors(all_namespaces=True):
        if actor["namespace"] == NAMESPACE and (run := re.fullmatch(r"run-(.+)-(\d+)", actor["name"])):
            runs.cancel(run[1], int(run[2]))
            runs.release(run[1], int(run[2]))


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> RunSpec:
    folder = tmp_path_factory.mktemp("training")
    data = folder / "rows.jsonl"
    rows = [{"prompt": f"{n} is ", "completion": "even" if n % 2 == 0 else "odd"} for n in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = make_tiny_llama(folder / "base")
    return tiny_run(base, data, folder / "runs", job_id="ft-none", **validated_on(data))


def _named(spec: RunSpec, job_id: str, **changes: Any) -> RunSpec:
    return replace(spec, job_id=job_id, output_dir=f"{spec.output_dir}/{job_id}", **changes)


def _wait(runs: RayRuns, spec: RunSpec, kinds: frozenset[str] = ENDS) -> list[Report]:
    deadline = time.monotonic() + 180
    reports: list[Report] = []
    while not reports or reports[-1].kind not in kinds:
        assert time.monotonic() < deadline, reports
        reports += runs.poll(spec.job_id, spec.attempt, len(reports)).reports
        time.sleep(0.1)
    return reports


def _losses(reports: list[Report]) -> list[float]:
    return [report.data["loss"] for report in reports if report.kind == "metrics"]


def _processes(word: str) -> set[int]:
    """Process ids of this cluster's actors whose class has that name. Ray titles a process after what it runs."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it ended while we looked
            title = " ".join(process.cmdline())
            if title.startswith("ray::") and word in title:
                found.add(process.pid)
    return found


def test_one_worker_and_two_on_two_nodes_with_copies_and_with_a_spread_base_follow_the_same_curve(
    runs: RayRuns, spec: RunSpec
) -> None:
    curves, held_out = [], []
    for workers, sharding in ((1, Sharding.AUTO), (2, Sharding.AUTO), (2, Sharding.ALWAYS)):
        mine = _named(spec, f"ft-workers-{workers}-{sharding}", num_workers=workers, sharding=sharding)
        runs.start(mine)
        runs.start(mine)
        reports = _wait(runs, mine)
        assert reports[-1].kind == "finished", reports[-1].data
        assert [report.sequence for report in reports] == list(range(1, len(reports) + 1))
        assert ("spread over them" in reports[0].data["message"]) == (sharding is Sharding.ALWAYS)
        assert set(reports[0].data["startup_seconds"]) == {"worker_group", "imports", "data", "model"}
        assert [report.data["step"] for report in reports if report.kind == "checkpoint"] == [5, 10]
        assert all((Path(r.data["uri"]) / "adapter_model.safetensors").is_file() for r in reports if "uri" in r.data)
        metrics = [report.data for report in reports if report.kind == "metrics"]
        assert [item["step"] for item in metrics] == list(range(1, 13))
        assert [item["step"] for item in metrics if "validation_loss" in item] == [5, 10, 12]
        curves.append([item["loss"] for item in metrics])
        held_out.append(reports[-1].data["validation_loss"])
        lines = (Path(mine.output_dir) / "reports.jsonl").read_text().splitlines()
        assert [json.loads(line)["kind"] for line in lines] == [report.kind for report in reports]
        assert not runs.poll(mine.job_id, 1, 0).alive
        runs.release(mine.job_id, 1)
    assert curves[0][-1] < curves[0][0] - 0.3
    for curve, loss in zip(curves[1:], held_out[1:], strict=True):
        assert curve == pytest.approx(curves[0], rel=1e-3)
        assert loss == pytest.approx(held_out[0], rel=1e-3)

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = Path(spec.output_dir) / f"ft-workers-2-{Sharding.ALWAYS}" / "adapter"
    assert sorted(file.name for file in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "graft.json",
    ]
    about = json.loads((folder / "graft.json").read_text())
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(spec.base_model_path), str(folder))
    assert len(about["probes"]) == 4
    for probe in about["probes"]:
        prompt, completion = probe["prompt_token_ids"], probe["completion_token_ids"]
        logprobs = loaded(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        scored = [float(logprobs[len(prompt) + n - 1, token]) for n, token in enumerate(completion)]
        assert sum(scored) / len(scored) == pytest.approx(probe["mean_logprob"], abs=1e-3)


def test_two_workers_learn_preferences_on_the_curves_of_one_and_stop_together(runs: RayRuns, spec: RunSpec) -> None:
    pairs = [{"prompt": f"{n}? ", "chosen": "yes, of course" * (n % 3 + 1), "rejected": "no"} for n in range(40)]
    # Held out is the contrary, so that its loss rises from the first step on.
    contrary = [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in pairs[:8]]
    files = []
    for name, rows in (("pairs", pairs), ("contrary", contrary)):
        files.append(Path(spec.output_dir).parent / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {
        "dataset_path": str(files[0]),
        "dataset_format": DatasetFormat.PREFERENCE,
        "validation_path": str(files[1]),
        "validation_format": DatasetFormat.PREFERENCE,
        "method": Method.PREFERENCE,
        "preference": Preference(0.2),
        "early_stopping_patience": 7,
        "eval_steps": 1,
        "total_steps": 50,
    }
    curves, ends = [], []
    for workers in (1, 2):
        mine = _named(spec, f"ft-preference-{workers}", num_workers=workers, **changes)
        runs.start(mine)
        reports = _wait(runs, mine)
        assert reports[-1].kind == "finished", reports[-1].data
        metrics = [report.data for report in reports if report.kind == "metrics"]
        ends.append(reports[-1].data)
        curves.append([[item[name] for name in ("loss", "margin", "validation_loss")] for item in metrics])
        runs.release(mine.job_id, 1)
    assert len(curves[0]) == 8
    assert curves[0][-1][0] < 0.5 * curves[0][0][0]
    for one, two in zip(*curves, strict=True):
        assert one == pytest.approx(two, rel=1e-2, abs=1e-3)
    assert [end["best_step"] for end in ends] == [1, 1]
    assert all(end["message"].startswith("Stopped early at step 8 of 50, best at step 1: ") for end in ends)


def test_every_weight_and_dora_train_and_leave_an_adapter_and_what_was_trained(runs: RayRuns, spec: RunSpec) -> None:
    full = _named(spec, "ft-full", tuning=Tuning.FULL, lora=Lora(), learning_rate=1e-3, delta_rank=8)
    dora = _named(spec, "ft-dora", lora=replace(spec.lora, use_dora=True), delta_rank=8, validation_path=None)
    for mine in (full, dora):
        runs.start(replace(mine, served_as=ServedAs.LOW_RANK_DELTA))
    for mine, kept in ((full, "model"), (dora, "trained_adapter")):
        reports = _wait(runs, mine)
        assert reports[-1].kind == "finished", reports[-1].data
        losses = _losses(reports)
        assert losses[-1] < losses[0] - 0.2
        result = reports[-1].data
        assert 0 < result["delta_retained_fraction"] <= 1
        assert abs(result["delta_loss_change"]) < losses[0] - losses[-1]
        (told,) = [report.data["message"] for report in reports if report.kind == "message"]
        assert ("the validation data's" if mine is full else "the training data's") in told
        assert ("validation_loss" in result) == (mine is full)
        root = Path(mine.output_dir)
        assert (root / "adapter" / "adapter_model.safetensors").is_file()
        assert (root / kept / ("config.json" if mine is full else "adapter_config.json")).is_file()
        runs.release(mine.job_id, 1)

    from transformers import AutoModelForCausalLM

    checkpoints = Path(full.output_dir) / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-10", "step-5"]
    AutoModelForCausalLM.from_pretrained(checkpoints / "step-10")


def _sweep(*pairs: tuple[float, int], **changes: Any) -> SearchSpec:
    trials = tuple(Trial(number, rate, rank, 2.0 * rank) for number, (rate, rank) in enumerate(pairs, start=1))
    return replace(SearchSpec(trials, grace_steps=3, reduction_factor=2.0, max_concurrent_trials=2), **changes)


def _idle_cpus() -> float:
    import ray

    return float(ray.available_resources().get("CPU", 0.0))


def test_a_sweep_keeps_the_trial_of_the_lowest_held_out_loss_whatever_becomes_of_the_others(
    runs: RayRuns, spec: RunSpec
) -> None:
    search = _sweep((1e-2, 4), (1e-2, 8), (1e-9, 4), (1.0, 4))
    mine = _named(spec, "ft-sweep", search=search, eval_steps=3)
    runs.start(mine)
    reports = _wait(runs, mine)
    end = reports[-1].data
    assert reports[-1].kind == "finished", end
    lines = {line["trial"]: line for line in end["trials"]}
    measured: dict[int, list[float]] = {number: [] for number in lines}
    for report in reports:
        if report.kind == "metrics" and "validation_loss" in report.data:
            measured[report.data["trial"]].append(report.data["validation_loss"])
    lowest = {number: min(losses) for number, losses in measured.items()}
    assert {number: line["best_validation_loss"] for number, line in lines.items()} == lowest
    assert end["best_trial"] == min(lowest, key=lambda number: lowest[number])
    assert end["validation_loss"] == lowest[end["best_trial"]]
    assert end["best_trial"] in (1, 2)
    # The one that does not learn is ended at its first measurement; the absurd one there too, or it diverges.
    assert (lines[3]["state"], lines[3]["steps"]) == ("ended_early", 3)
    assert lines[4]["state"] in ("ended_early", "failed")
    assert lines[4]["steps"] < 12
    best = search.trials[end["best_trial"] - 1]
    assert end["chosen"] == {"learning_rate": best.learning_rate, "lora.rank": best.rank, "lora.alpha": best.alpha}
    progress = [report.data["sweep"] for report in reports if report.kind == "metrics"]
    assert all(item["total_steps"] == 48 for item in progress)
    told = [report.data["message"] for report in reports if report.kind == "message"]
    assert sum(" starts: " in text for text in told) == 4
    assert any(text.startswith("Trial 3 of 4 ends early at step 3 of 12") for text in told)

    folder = Path(mine.output_dir) / "adapter"
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == best.rank
    about = json.loads((folder / "graft.json").read_text())

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(spec.base_model_path), str(folder))
    for probe in about["probes"]:
        prompt, completion = probe["prompt_token_ids"], probe["completion_token_ids"]
        logprobs = loaded(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        scored = [float(logprobs[len(prompt) + n - 1, token]) for n, token in enumerate(completion)]
        assert sum(scored) / len(scored) == pytest.approx(probe["mean_logprob"], abs=1e-3)
    runs.release(mine.job_id, 1)
    _wait_for_room()


def test_a_killed_trial_fails_alone_and_a_cancelled_sweep_leaves_nothing(runs: RayRuns, spec: RunSpec) -> None:
    mine = _named(spec, "ft-sweep-cancel", search=_sweep((1e-3, 4), (2e-3, 4)), total_steps=100_000, eval_steps=50_000)
    runs.start(mine)
    reports = _wait(runs, mine, frozenset({"metrics"}))
    victims = _processes("ImplicitFunc") | _processes("_trial")
    assert victims
    os.kill(min(victims), signal.SIGKILL)
    deadline = time.monotonic() + 60
    while not (failed := [r for r in reports if " has failed, and the others go on" in r.data.get("message", "")]):
        assert time.monotonic() < deadline
        reports += runs.poll(mine.job_id, 1, len(reports)).reports
        time.sleep(0.1)
    assert len(failed) == 1
    assert runs.poll(mine.job_id, 1, 0).alive
    runs.cancel(mine.job_id, 1)
    assert _wait(runs, mine)[-1].kind == "cancelled"
    runs.release(mine.job_id, 1)
    deadline = time.monotonic() + 10
    while _processes("ImplicitFunc") | _processes("_trial") | _processes("Search"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    _wait_for_room()


def test_a_sweep_of_which_no_trial_can_train_fails_with_their_reason(runs: RayRuns, spec: RunSpec) -> None:
    mine = _named(spec, "ft-sweep-fails", search=_sweep((1e-3, 4), (2e-3, 4)), context_tokens=3)
    runs.start(mine)
    report = _wait(runs, mine)[-1]
    assert (report.kind, report.data["code"], report.data["reason"]) == ("failed", "INVALID_ARGUMENT", "NO_EXAMPLES")
    assert "Trial 1: None of the 40" in report.data["message"]
    assert "prepare" in (Path(mine.output_dir) / "error.log").read_text()
    runs.release(mine.job_id, 1)


def _wait_for_room() -> None:
    """Waits until both CPUs are free again: nothing that has ended holds a reservation."""
    deadline = time.monotonic() + 20
    while _idle_cpus() < 2:
        assert time.monotonic() < deadline, _idle_cpus()
        time.sleep(0.1)


FOLLOW = """
import json, sys, time
import ray
from graft.training.link import NAMESPACE
from graft.training.run import RayRuns
ray.init(address=sys.argv[1], namespace="graft", log_to_driver=False)
runs, seen = RayRuns(), []
while True:
    status = runs.poll(sys.argv[2], 1, len(seen))
    seen += status.reports
    if not status.alive and not status.reports:
        break
    time.sleep(0.05)
print(json.dumps([[report.sequence, report.kind] for report in seen]))
"""


def test_a_running_run_is_followed_to_its_end_from_another_process(runs: RayRuns, spec: RunSpec) -> None:
    import ray

    mine = _named(spec, "ft-adopted", total_steps=60, num_workers=2)
    runs.start(mine)
    first = runs.poll(mine.job_id, 1, 0)
    assert (first.exists, first.alive) == (True, True)
    address = ray.get_runtime_context().gcs_address
    found = subprocess.run(
        [sys.executable, "-c", FOLLOW, address, mine.job_id], capture_output=True, text=True, check=True, timeout=200
    )
    seen = json.loads(found.stdout.splitlines()[-1])
    assert [sequence for sequence, _ in seen] == list(range(1, len(seen) + 1))
    kinds = [kind for _, kind in seen]
    assert kinds.count("metrics") == 60
    assert (kinds[0], kinds[-1]) == ("started", "finished")
    runs.release(mine.job_id, 1)


def test_a_running_run_is_cancelled_and_all_its_processes_end_within_five_seconds(runs: RayRuns, spec: RunSpec) -> None:
    mine = _named(spec, "ft-cancel", total_steps=100_000)
    runs.start(mine)
    _wait(runs, mine, frozenset({"metrics"}))
    assert _processes("RayTrainWorker")
    asked = time.monotonic()
    runs.cancel(mine.job_id, 1)
    runs.cancel(mine.job_id, 1)
    assert _wait(runs, mine)[-1].kind == "cancelled"
    while _processes("RayTrainWorker") | _processes("TrainController"):
        assert time.monotonic() - asked < 5
        time.sleep(0.05)
    runs.release(mine.job_id, 1)
    while runs.poll(mine.job_id, 1, 0).exists:
        assert time.monotonic() - asked < 10
        time.sleep(0.05)


@pytest.mark.parametrize("workers", [2, 3], ids=["that start", "for whom there is no room"])
def test_a_run_cancelled_before_its_workers_are_up_gives_their_places_back(
    runs: RayRuns, spec: RunSpec, workers: int
) -> None:
    import ray
    from ray.util.placement_group import placement_group_table

    def reserved() -> list[dict[str, Any]]:
        return [found for found in placement_group_table().values() if found["state"] != "REMOVED"]

    mine = _named(spec, f"ft-early-{workers}", total_steps=100_000, num_workers=workers)
    deadline = time.monotonic() + 60
    runs.start(mine)
    while not reserved():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not [report for report in runs.poll(mine.job_id, 1, 0).reports if report.kind == "started"]
    runs.cancel(mine.job_id, 1)
    while reserved() or ray.available_resources().get("CPU") != 2:
        assert time.monotonic() < deadline, reserved()
        time.sleep(0.1)
    runs.release(mine.job_id, 1)


def test_a_later_attempt_ends_the_earlier_one_which_cannot_come_back(runs: RayRuns, spec: RunSpec) -> None:
    first = _named(spec, "ft-again", total_steps=100_000)
    second = replace(first, attempt=2, total_steps=2, output_dir=f"{first.output_dir}/2")
    runs.start(first)
    runs.start(second)
    assert _wait(runs, second)[-1].kind == "finished"
    assert not runs.poll(first.job_id, 1, 0).exists
    with pytest.raises(Aborted, match="superseded by attempt 2"):
        runs.start(first)
    runs.release(first.job_id, 2)


def test_a_failure_is_told_in_one_sentence_and_its_trace_kept(runs: RayRuns, spec: RunSpec) -> None:
    mine = _named(spec, "ft-fails", context_tokens=3, num_workers=2)
    runs.start(mine)
    report = _wait(runs, mine)[-1]
    assert (report.kind, report.data["code"], report.data["reason"]) == ("failed", "INVALID_ARGUMENT", "NO_EXAMPLES")
    assert report.data["message"].startswith("None of the 40")
    assert "prepare" in (Path(mine.output_dir) / "error.log").read_text()
    runs.release(mine.job_id, 1)


def test_a_killed_worker_fails_the_run_with_the_likely_cause(runs: RayRuns, spec: RunSpec) -> None:
    mine = _named(spec, "ft-killed", total_steps=100_000)
    runs.start(mine)
    _wait(runs, mine, frozenset({"metrics"}))
    for process in _processes("RayTrainWorker"):
        os.kill(process, signal.SIGKILL)
    report = _wait(runs, mine)[-1]
    assert (report.kind, report.data["reason"]) == ("failed", "WORKER_DIED"), report
    assert "memory" in report.data["message"]
    assert (Path(mine.output_dir) / "error.log").is_file()
    runs.release(mine.job_id, 1)


def test_an_unknown_run_does_not_exist_and_may_be_cancelled_and_released(runs: RayRuns) -> None:
    assert not runs.poll("ft-unknown", 1, 0).exists
    runs.cancel("ft-unknown", 1)
    runs.release("ft-unknown", 1)
