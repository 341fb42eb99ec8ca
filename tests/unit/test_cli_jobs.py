"""`graft tune`, and Ctrl-C: jobs created, followed to their end and shown, through the real command and gateway."""

import asyncio
import os
import pty
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from graft.domain.jobs import Checkpoint, EventLevel, Job, JobError, JobState, Progress, Resolved
from tests.support.command import Ran, ended, graft, printed, started, waiting
from tests.support.gateways import BASE, NOW, Gateway, eventually, gateway
from tests.unit.test_gateway_jobs import claimed, created, moved, uploaded

TRAINED = f"{BASE}:reviews@4"
TO_RUNNING = (JobState.QUEUED, JobState.STARTING, JobState.RUNNING)
TO_THE_END = (JobState.REGISTERING, JobState.EVALUATING, JobState.SUCCEEDED)


async def ran(it: Gateway, *arguments: str) -> Ran:
    return await graft(*arguments, GRAFT_ADDRESS=it.address)


@asynccontextmanager
async def orchestrated(it: Gateway) -> AsyncIterator[asyncio.Task[Job]]:
    """Takes the next job to its end, as an orchestrator would."""

    async def work() -> Job:
        while not (await it.store.list_jobs("default", 10, "")).items:  # noqa: ASYNC110 - a row, not an event
            await asyncio.sleep(0.01)
        return await trained(it)

    task = asyncio.create_task(work())
    try:
        yield task
    finally:
        task.cancel()


async def trained(it: Gateway) -> Job:
    """The one job, claimed and moved to success with everything that a real one leaves behind."""
    job = await claimed(it)
    resolved = (
        Resolved("learning_rate", 5e-4, True, "Measured for 135M parameters."),
        Resolved("lora.target_modules", ["q_proj", "v_proj"], True, "All linear layers."),
        Resolved("epochs", 2.0, False, "Given by the job."),
    )
    job = await it.store.record(job, "test", resolved=resolved)
    job = await moved(it, job, *TO_RUNNING)
    job = await it.store.record(
        job,
        "test",
        progress=Progress(20, 40, 0.5, 0.75, 150.0, 1000, 60.0),
        event=(EventLevel.INFO, "metrics", "Step 20 of 40, loss 0.7500.", {"step": 20}),
    )
    job = await it.store.record(
        job,
        "test",
        checkpoint=Checkpoint(20, NOW, "runs/checkpoint-20", 1, {"loss": 0.75}),
        event=(EventLevel.WARN, "message", "One example was too long.", {}),
    )
    job = await it.store.record(job, "test", metrics={"train_loss": 0.5})
    return await moved(it, job, *TO_THE_END, fine_tuned_model=TRAINED)


async def test_create_follows_the_job_to_its_end_in_a_log(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        dataset = (await uploaded(it)).rsplit("/", 1)[1]
        options = ["--suffix", "reviews", "--epochs", "2", "--rank", "4", "--batch-size", "2", "--max-steps", "9"]
        settings = ["--set", "lora.target_modules=q_proj,v_proj", "--set", "weight_decay=0.1"]
        settings += ["--set", "seed=3", "--set", "over_length_policy=truncate", "--set", "lora.alpha=16"]
        settings += ["--set", "sharding=never"]
        async with orchestrated(it):
            followed = await ran(it, "tune", "create", BASE, dataset, *options, *settings)
        (job,) = (await it.store.list_jobs("default", 10, "")).items
    asked, lora = job.spec.hyperparameters, job.spec.lora
    assert (asked.epochs, asked.batch_size, asked.max_steps, asked.weight_decay, asked.seed) == (2.0, 2, 9, 0.1, 3)
    assert (asked.over_length_policy, asked.sharding) == ("truncate", "never")
    assert (lora.rank, lora.alpha, lora.target_modules) == (4, 16.0, ("q_proj", "v_proj"))
    assert followed.code == 0
    lines = followed.out.splitlines()
    assert lines[0] == f"Job {job.id} is created: supervised, LoRA, served as an adapter."
    assert lines[1].startswith("Training needs about 2.61 GB (weights 0.54, ")
    states = list(dict.fromkeys(line.split()[1] for line in lines[2:-1]))
    assert states == ["validating", *(state.lower() for state in (*TO_RUNNING, *TO_THE_END))]
    assert any(line.endswith("One example was too long.") for line in lines)
    assert lines[-1] == f"{TRAINED} is ready. Try it: graft chat {TRAINED}"


async def test_create_and_watch_with_json_print_an_object_a_line(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        dataset = (await uploaded(it)).rsplit("/", 1)[1]
        async with orchestrated(it):
            followed = await ran(it, "tune", "create", BASE, dataset, "--json")
        first, *updates = followed.json_lines
        job_id = first["fine_tuning_job"]["name"].rsplit("/", 1)[1]
        watched = await ran(it, "tune", "watch", job_id, "--after", "2", "--json")
    assert (followed.code, watched.code) == (0, 0)
    assert int(first["fine_tuning_job"]["memory_estimate"]["total_bytes"]) > 2_000_000_000
    assert [update["event"]["sequence"] for update in updates] == [str(n + 1) for n in range(len(updates))]
    assert updates[-1]["fine_tuning_job"]["state"] == "STATE_SUCCEEDED"
    assert updates[-1]["fine_tuning_job"]["fine_tuned_model"] == TRAINED
    assert watched.json_lines == [
        {**update, "fine_tuning_job": watched.json_lines[0]["fine_tuning_job"]} for update in updates[2:]
    ]


async def test_create_without_following_returns_the_job(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        dataset = (await uploaded(it)).rsplit("/", 1)[1]
        as_json = await ran(it, "tune", "create", BASE, dataset, "--no-follow", "--json")
        assert as_json.json["state"] == "STATE_VALIDATING"
        text = await ran(it, "tune", "create", BASE, dataset, "--no-follow")
        assert text.out.startswith("Job ft-")
        listed = await ran(it, "tune", "list")
        assert [line.split()[2] for line in listed.out.splitlines()] == ["STATE", "validating", "validating"]


async def test_create_uploads_files_as_the_format_that_is_given(tmp_path: Path) -> None:
    rows, heldout = tmp_path / "rows.jsonl", tmp_path / "held-out.jsonl"
    rows.write_text('{"review": "A joy.", "sentiment": "positive"}\n')
    heldout.write_text('{"review": "A bore.", "sentiment": "negative"}\n')
    async with gateway(tmp_path) as it:
        options = ("--validation", heldout, "--task", "sentiment", "--no-follow", "--json")
        made = await ran(it, "tune", "create", BASE, rows, "--format", "fields", *options)
        names = [made.json[side].rsplit("/", 1)[1] for side in ("training_dataset", "validation_dataset")]
        found = [await it.store.get_dataset("default", name) for name in names]
        by_url = await ran(it, "tune", "create", BASE, rows.as_uri(), "--format", "fields", *options[2:-1])
        assert by_url.code == 0, by_url.err
        assert f"{rows.as_uri()} is uploaded as data set ds-" in by_url.out
    assert [(one.display_name, one.format) for one in found] == [("rows.jsonl", "fields"), ("held-out.jsonl", "fields")]


@pytest.mark.parametrize("given", ["rows.jsnl", "./rows", "data/rows"])
async def test_a_mistyped_path_is_told_as_that_and_not_as_an_id(given: str) -> None:
    for command in (
        ("tune", "create", BASE, given),
        ("compare", given, BASE),
        ("compare", "ds-1", BASE, "--shots-from", given),
    ):
        refused = await graft(*command, GRAFT_ADDRESS="127.0.0.1:1")
        assert refused.code == 2
        assert refused.err.startswith(f"{given} is neither a file here nor the id of a data set")


async def test_a_failed_job_is_exit_code_1_with_its_reason(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        job = await created(it)
        error = JobError("INVALID_ARGUMENT", "NO_EXAMPLES", "All examples are too long.")
        await moved(it, await claimed(it), JobState.FAILED, error=error)
        job_id = job.name.rsplit("/", 1)[1]
        text, as_json, shown = await asyncio.gather(
            ran(it, "tune", "watch", job_id),
            ran(it, "tune", "watch", job.name, "--json"),
            ran(it, "tune", "get", job_id),
        )
    assert (text.code, as_json.code, shown.code) == (1, 1, 0)
    assert text.err == f"Job {job_id} has ended as failed: All examples are too long.\n"
    assert as_json.json_lines[-1]["fine_tuning_job"]["error"]["message"] == "All examples are too long."
    assert as_json.err == ""
    assert "All examples are too long." in shown.out


async def test_a_finished_job_is_shown_with_what_was_derived_and_why(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        job = (await created(it, suffix="reviews")).name.rsplit("/", 1)[1]
        await trained(it)
        got, got_json, listed, events, events_json, checkpoints, checkpoints_json = await asyncio.gather(
            ran(it, "tune", "get", job),
            ran(it, "tune", "get", job, "--json"),
            ran(it, "tune", "list", "--json"),
            ran(it, "tune", "events", job),
            ran(it, "tune", "events", job, "--json"),
            ran(it, "tune", "checkpoints", job),
            ran(it, "tune", "checkpoints", job, "--json"),
        )
    lines = [line.split(maxsplit=3) for line in got.out.splitlines()]
    assert ["result", TRAINED] in lines
    assert ["train_loss", "0.5"] in lines
    assert ["learning_rate", "0.0005", "yes", "Measured for 135M parameters."] in lines
    assert any(line[:3] == ["lora.target_modules", "q_proj,", "v_proj"] for line in lines)
    assert ["epochs", "2", "no", "Given by the job."] in lines
    assert got_json.json["resolved_hyperparameters"][2]["derived"] is False
    assert listed.json[0]["progress"]["step"] == 20
    assert "Step 20 of 40, loss 0.7500." in events.out
    assert [event["sequence"] for event in events_json.json] == [str(n + 1) for n in range(len(events_json.json))]
    assert checkpoints.out.splitlines()[1].split()[-3:] == ["loss", "0.75", "runs/checkpoint-20"]
    assert checkpoints_json.json[0]["step"] == 20


async def test_a_job_is_cancelled_and_an_ended_one_is_not(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        job = await created(it)
        asked = await ran(it, "tune", "cancel", job.name)
        assert (asked.code, asked.out) == (0, "Cancellation is requested.\n")
        assert "validating, cancel requested" in (await ran(it, "tune", "get", job.name)).out
        again = await ran(it, "tune", "cancel", job.name, "--json")
        assert again.json["cancel_requested"] is True
        await trained(it)
        late = await ran(it, "tune", "cancel", job.name, "--json")
        assert (late.code, late.error["code"]) == (2, "FAILED_PRECONDITION")


async def test_wrong_settings_are_refused_before_anything_is_sent() -> None:
    nowhere = "127.0.0.1:1"
    unknown, mistyped, choice, loose = await asyncio.gather(
        *(
            graft("tune", "create", BASE, "ds-1", "--set", setting, GRAFT_ADDRESS=nowhere)
            for setting in ("epoch=1", "seed=one", "over_length_policy=cut", "weight_decay")
        )
    )
    assert [each.code for each in (unknown, mistyped, choice, loose)] == [2] * 4
    assert unknown.err.startswith("--set epoch=1: use NAME=VALUE with one of: epochs, ")
    assert mistyped.err == "--set seed=one: 'one' is not a whole number.\n"
    assert choice.err == "--set over_length_policy=cut: use one of: drop, truncate, fail.\n"
    assert "lora.rank" in loose.err


async def test_ctrl_c_stops_following_and_not_the_job(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        dataset = (await uploaded(it)).rsplit("/", 1)[1]
        text = await started("tune", "create", BASE, dataset, GRAFT_ADDRESS=it.address)
        await printed(text, "validating")
        text.send_signal(signal.SIGINT)
        stopped = await ended(text)
        (job,) = (await it.store.list_jobs("default", 10, "")).items
        assert stopped.code == 130
        assert stopped.err == (
            f"Job {job.id} goes on. Follow it with `graft tune watch {job.id}`, "
            f"or end it with `graft tune cancel {job.id}`.\n"
        )
        assert not job.cancel_requested

        as_json = await started("tune", "watch", job.id, "--json", GRAFT_ADDRESS=it.address)
        await printed(as_json, "\n")
        as_json.send_signal(signal.SIGINT)
        stopped = await ended(as_json)
        assert (stopped.code, stopped.error["reason"]) == (130, "INTERRUPTED")


async def test_in_a_talk_ctrl_c_stops_the_answer_and_then_the_talk(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    async with gateway(tmp_path) as it:
        talk = await started("chat", BASE, stdin=theirs, GRAFT_ADDRESS=it.address)
        try:
            await printed(talk, "> ")
            it.engine.delay_seconds = 2.0
            os.write(ours, b"first\n")
            # Of four pieces, two seconds apart.
            await printed(talk, "[base] ")
            talk.send_signal(signal.SIGINT)
            await printed(talk, "> ")
            await eventually(lambda: it.engine.abandoned == 1)
            it.engine.delay_seconds = 0.0
            os.write(ours, b"second\n")
            await printed(talk, "three\n> ")
            turns = it.engine.requests[-1][1]["messages"]
            assert [turn["content"] for turn in turns] == ["first", "[base] ", "second"]
            # A question that fails is told of, forgotten, and does not end the talk.
            it.engine.refuse = 400
            os.write(ours, b"third\n")
            await printed(talk, "> ")
            await waiting(talk)
            talk.send_signal(signal.SIGINT)
            left = await ended(talk)
        finally:
            os.close(ours)
            os.close(theirs)
    assert left.code == 130
    assert "top_p must be in (0, 1]." in left.err


async def test_ctrl_d_leaves_a_talk(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    async with gateway(tmp_path) as it:
        talk = await started("chat", BASE, stdin=theirs, GRAFT_ADDRESS=it.address)
        try:
            await printed(talk, "> ")
            os.write(ours, b"\x04")
            assert (await ended(talk)).code == 0
        finally:
            os.close(ours)
            os.close(theirs)
