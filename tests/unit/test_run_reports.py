"""What a run's actor keeps of what it is told, and what is known of one that does not answer; without Ray."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError

from graft.training.places import ERRORS, REPORTS
from graft.training.run import RayRuns, _Run
from graft.training.spec import RunStatus
from tests.support.run_specs import tiny_run


def test_a_run_whose_folder_takes_nothing_more_has_ended_all_the_same(tmp_path: Path) -> None:
    run = _Run(tiny_run(tmp_path, tmp_path, tmp_path / "run"))
    for name in (REPORTS, ERRORS):
        (tmp_path / "run" / name).mkdir()  # as on a full disk, what is written there raises OSError
    run.tell("failed", {"reason": "DISK_FULL"}, "Traceback")
    alive, reports, _ = run.poll(0)
    assert not alive
    assert [(report.kind, report.data) for report in reports] == [("failed", {"reason": "DISK_FULL"})]


def test_a_run_that_cannot_be_reached_for_the_moment_is_not_taken_for_one_that_has_died(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error: Exception = ActorUnavailableError("The connection was lost.", None)

    def answer(*_: object, **__: object) -> None:
        raise error

    method = SimpleNamespace(remote=lambda *_: None)
    monkeypatch.setattr(ray, "get_actor", lambda *_, **__: SimpleNamespace(poll=method, cancel=method))
    monkeypatch.setattr(ray, "get", answer)
    monkeypatch.setattr("graft.training.run.give_back", lambda _: None)
    runs = RayRuns()
    for ask in (lambda: runs.poll("ft-1", 1, 0), lambda: runs.cancel("ft-1", 1)):
        with pytest.raises(ActorUnavailableError):
            ask()
    error = ActorDiedError()
    assert runs.poll("ft-1", 1, 0) == RunStatus(False, False, [])
    runs.cancel("ft-1", 1)
