import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from graft.child import run

MODULE = "tests.support.reporting_child"


def test_reports_come_in_order_whatever_libraries_print() -> None:
    reports: list[dict[str, Any]] = []
    ended = run(MODULE, {"then": "finish"}, reports.append, {})
    assert [report["kind"] for report in reports] == ["started", "finished"]
    assert (ended.report, ended.exit_code) == ({"kind": "finished"}, 0)


def test_how_it_ended_is_told_when_it_does_not_say_so_itself() -> None:
    failed = run(MODULE, {"then": "fail"}, lambda _: None, {})
    assert (failed.report["kind"], failed.cause) == ("started", "exit code 1: it went wrong")
    died = run(MODULE, {"then": "die"}, lambda _: None, {})
    assert died.cause == "its process was ended by signal 9 (SIGKILL), most likely for memory"
    absent = run("tests.support.no_such_module", {}, lambda _: None, {})
    assert absent.report == {"kind": "nothing"}
    assert "No module named" in absent.cause


def test_what_ends_the_wait_ends_the_process() -> None:
    pids = []

    def leave(report: dict[str, Any]) -> None:
        pids.append(report["pid"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(MODULE, {"then": "sleep"}, leave, {})
    assert [psutil.pid_exists(pid) for pid in pids] == [False]


def test_a_process_whose_parent_is_gone_cleans_up_and_ends(tmp_path: Path) -> None:
    folder = tmp_path / "half"
    folder.mkdir()
    child = subprocess.Popen(
        [sys.executable, "-m", MODULE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    with child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(json.dumps({"then": "sleep", "folder": str(folder)}).encode() + b"\n")
        child.stdin.flush()
        assert json.loads(child.stdout.readline())["kind"] == "started"
        child.stdin.close()
        assert child.wait(30) == 1
    assert not folder.exists()
