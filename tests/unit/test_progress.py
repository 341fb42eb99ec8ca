"""What `JobsProgress` shows on a terminal and in a log."""

import io

from rich.console import Console

from graft.cli.progress import Event, Job, JobsProgress


def job(state: str, step: int = 0, loss: float = 0.0, left_seconds: int | None = None) -> Job:
    made = Job(state=state)
    if step:
        made.progress.step, made.progress.total_steps = step, 40
        made.progress.loss, made.progress.tokens_per_second = loss, 153.4
    if left_seconds is not None:
        made.progress.remaining.FromSeconds(left_seconds)
    return made


def moved(state: str, message: str, level: Event.Level.ValueType = Event.LEVEL_INFO) -> Event:
    event = Event(type="state", message=message, level=level)
    event.data["state"] = state
    return event


def log() -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=60), out


def test_a_log_gets_one_line_a_change_of_state() -> None:
    console, out = log()
    with JobsProgress(console, plain_seconds=1e9) as progress:
        progress.add("ft-1", "reviews")
        progress.add("ft-2", "docs [x]")
        progress.update("ft-1", job("STATE_QUEUED"), moved("QUEUED", "The data is valid."))
        progress.update(
            "ft-1", job("STATE_QUEUED"), Event(type="message", level=Event.LEVEL_INFO, message="As planned.")
        )
        progress.update("ft-2", job("STATE_RUNNING"))
        progress.update("ft-1", job("STATE_RUNNING"), moved("RUNNING", "Training."))
        for step in (10, 20, 30):
            progress.update("ft-1", job("STATE_RUNNING", step, 0.5), Event(type="metrics", level=Event.LEVEL_INFO))
        progress.update("ft-1", job("STATE_SUCCEEDED", 40, 0.25), moved("SUCCEEDED", "Done."))
    assert out.getvalue().splitlines() == [
        "reviews   queued       The data is valid.",
        "docs [x]  running",
        "reviews   running      Training.",
        # However long the line, a log's width folds nothing.
        "reviews   succeeded    step 40/40  loss 0.2500  153 tokens/s  Done.",
    ]


def test_a_log_gets_progress_from_time_to_time_with_the_time_left() -> None:
    console, out = log()
    with JobsProgress(console, plain_seconds=0) as progress:
        progress.add("ft-1", "reviews")
        progress.update("ft-1", job("STATE_RUNNING"))
        progress.update("ft-1", job("STATE_RUNNING", 10, 0.5, left_seconds=90))
        progress.update("ft-1", job("STATE_RUNNING", 40, 0.25, left_seconds=0))
    assert out.getvalue().splitlines() == [
        "reviews  running",
        "reviews  running      step 10/40  loss 0.5000  153 tokens/s  0:01:30 left",
        "reviews  running      step 40/40  loss 0.2500  153 tokens/s",
    ]


def test_what_a_method_has_beside_its_loss_is_shown_from_the_newest_step() -> None:
    console, out = log()
    with JobsProgress(console, plain_seconds=0) as progress:
        progress.add("ft-1", "pairs")
        progress.update("ft-1", job("STATE_RUNNING"))
        for step, accuracy in ((10, 0.5), (20, 0.875)):
            event = Event(type="metrics", level=Event.LEVEL_INFO)
            event.data["accuracy"] = accuracy
            progress.update("ft-1", job("STATE_RUNNING", step, 0.5, left_seconds=0), event)
    assert out.getvalue().splitlines() == [
        "pairs  running",
        "pairs  running      step 10/40  loss 0.5000  accuracy 0.50  153 tokens/s",
        # Nothing is left although steps are: training has stopped early.
        "pairs  running      step 20/40  loss 0.5000  accuracy 0.88  153 tokens/s",
    ]


def test_warnings_and_failures_are_told_once() -> None:
    console, out = log()
    with JobsProgress(console) as progress:
        progress.add("ft-1", "reviews")
        progress.update("ft-1", job("STATE_QUEUED"), moved("QUEUED", "Waiting."))
        progress.update(
            "ft-1", job("STATE_QUEUED"), Event(type="message", level=Event.LEVEL_WARN, message="MLflow is away.")
        )
        progress.update("ft-1", job("STATE_FAILED"), moved("FAILED", "No examples.", Event.LEVEL_ERROR))
    assert out.getvalue().splitlines() == [
        "reviews  queued       Waiting.",
        "reviews  queued       MLflow is away.",
        "reviews  failed       No examples.",
    ]


def test_past_changes_are_told_in_order_although_the_job_has_ended() -> None:
    console, out = log()
    with JobsProgress(console) as progress:
        progress.add("ft-1", "reviews")
        for state in ("VALIDATING", "QUEUED", "CANCELLED"):
            progress.update("ft-1", job("STATE_CANCELLED"), moved(state, ""))
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["validating", "queued", "cancelled"]


def test_a_terminal_shows_every_job_as_one_living_line() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, record=True, _environ={"TERM": "xterm"})
    with JobsProgress(console) as progress:
        progress.add("ft-1", "reviews")
        progress.add("ft-2", "docs [x]")
        progress.update("ft-1", job("STATE_RUNNING", 10, 0.5, left_seconds=90))
        progress.update("ft-2", job("STATE_QUEUED"))
        progress.update("ft-2", job("STATE_QUEUED"), Event(type="message", level=Event.LEVEL_WARN, message="[w]aits"))
        progress.update("ft-1", job("STATE_SUCCEEDED", 40, 0.25, left_seconds=0), moved("SUCCEEDED", "Done."))
        progress.update("ft-2", job("STATE_FAILED"), moved("FAILED", "No examples.", Event.LEVEL_ERROR))
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    # The record ends with what remains on the screen, one line a job; warnings have scrolled by above it.
    reviews, docs = lines[-2:]
    assert "reviews  succeeded " in reviews
    assert reviews.endswith("40/40 loss 0.2500 153 tokens/s")
    assert docs.startswith("docs [x] failed")
    assert any(line.endswith("[w]aits") for line in lines)
    assert any(line.endswith("No examples.") for line in lines)
