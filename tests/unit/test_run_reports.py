"""What a run's actor keeps of what it is told; without Ray."""

from pathlib import Path

from graft.training.places import ERRORS, REPORTS
from graft.training.run import _Run
from tests.support.run_specs import tiny_run


def test_a_run_whose_folder_takes_nothing_more_has_ended_all_the_same(tmp_path: Path) -> None:
    run = _Run(tiny_run(tmp_path, tmp_path, tmp_path / "run"))
    for name in (REPORTS, ERRORS):
        (tmp_path / "run" / name).mkdir()  # as on a full disk, what is written there raises OSError
    run.tell("failed", {"reason": "DISK_FULL"}, "Traceback")
    alive, reports, _ = run.poll(0)
    assert not alive
    assert [(report.kind, report.data) for report in reports] == [("failed", {"reason": "DISK_FULL"})]
