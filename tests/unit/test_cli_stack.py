"""`graft up`, `down` and `status`: what they print, and what is refused before anything starts."""

import asyncio
import errno
import os
import socket
import sys
from pathlib import Path

import pytest

from graft.domain.errors import FailedPrecondition
from graft.settings import load
from graft.stack import local, preflight
from graft.stack.processes import Port, port_taken, ray_environment
from tests.support.command import Ran, ended, environment, graft, printed, short_home, started

UP = """
import sys
from graft.stack import local
from graft.stack.processes import Process
local.local_stack = lambda settings: [
    Process('only', (sys.executable, '-c', 'import time; time.sleep(1000)'), lambda: True)
]
from graft.cli.main import main
main()
"""
"""`graft up` with a stack of one process that is quick to start."""


async def up(home: Path, *arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", UP, "up", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment(GRAFT_HOME=home),
    )


async def down(home: Path, *arguments: str) -> Ran:
    """As a process of its own: a child of this process can be waited for only once."""
    return await ended(await started("down", *arguments, GRAFT_HOME=home))


async def test_a_stack_is_started_shown_and_stopped_in_words() -> None:
    with short_home() as home:
        nothing, idle = await asyncio.gather(graft("status", GRAFT_HOME=home), graft("down", GRAFT_HOME=home))
        assert (nothing.code, idle.code) == (4, 0)
        assert nothing.out == "No stack is running. Start one with `graft up`.\n"
        assert idle.out == "No stack is running.\n"

        running = await up(home)
        try:
            out = await printed(running, f"{home}/logs\n")
            assert [line.split()[:2] for line in out.splitlines()[:3]] == [
                ["only", "waiting"],
                ["only", "starting"],
                ["only", "ready"],
            ]
            assert (
                f"gRPC 127.0.0.1:50051, HTTP http://127.0.0.1:8080/v1, MLflow http://127.0.0.1:5000, logs {home}/logs"
                in out
            )
            shown = await graft("status", GRAFT_HOME=home)
            assert shown.code == 0
            assert shown.out.splitlines()[1].split()[:2] == ["only", "ready"]
            second = await ended(await up(home))
            assert second.code == 2
            assert "running already" in second.err
            assert (await down(home)).out == "Stopped.\n"
        finally:
            if running.returncode is None:
                running.terminate()
        last = await ended(running)
        assert (last.code, last.out.splitlines()[-1].split()) == (0, ["only", "stopped"])


async def test_a_stack_that_runs_already_is_a_success_of_detach_unless_its_settings_are_others() -> None:
    with short_home() as home:
        running = await up(home)
        try:
            await printed(running, f"{home}/logs\n")
            again, as_json = await ended(await up(home, "--detach")), await ended(await up(home, "--detach", "--json"))
            assert (again.code, again.err) == (0, "")
            already, where = again.out.splitlines()
            assert already == "The stack is running already."
            assert where.startswith("Ready. gRPC 127.0.0.1:50051, HTTP http://127.0.0.1:8080/v1, ")
            assert (as_json.code, as_json.json["ready"], as_json.json["grpc"]) == (0, True, "127.0.0.1:50051")
            other = await graft("up", "--detach", "--json", GRAFT_HOME=home, GRAFT_SERVING_MAX_LORAS=3)
            assert (other.code, other.error["reason"]) == (2, "STACK_RUNNING")
            assert other.error["metadata"] == {"sections": "serving"}
            assert running.returncode is None
        finally:
            await down(home)
        assert (await ended(running)).code == 0


async def test_detach_waits_for_a_stack_that_is_not_ready_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    with short_home() as home:
        settings = load({"GRAFT_HOME": str(home)})
        record = {"ready": False, "processes": [{"name": "engine", "state": "restarting", "log": "engine.log"}]}
        records = iter([record, record, {**record, "ready": True}])
        monkeypatch.setattr(local, "read_status", lambda _home: next(records, None))
        assert local.start_detached(settings) is False
        with pytest.raises(FailedPrecondition) as gone:
            local._await_running(settings, record, lambda _: None)
        assert gone.value.reason == "STACK_FAILED"
        monkeypatch.setattr(local, "read_status", lambda _home: record)
        monkeypatch.setattr(local, "READY_SECONDS", 0.0)
        with pytest.raises(FailedPrecondition, match=r"engine .restarting, engine.log.") as late:
            local.start_detached(settings)
        assert late.value.reason == "STACK_NOT_READY"


async def test_a_missing_package_is_one_sentence_with_its_fix(tmp_path: Path) -> None:
    # Found before the installed one: a Graft that needs what nobody has.
    described = tmp_path / "graft-0.1.0.dist-info" / "METADATA"
    described.parent.mkdir()
    described.write_text("Metadata-Version: 2.1\nName: graft\nVersion: 0.1.0\nRequires-Dist: scion-and-rootstock>=2\n")
    with short_home() as home:
        process = await started("up", GRAFT_HOME=home, PYTHONPATH=tmp_path)
        refused = await ended(process)
        assert (refused.code, refused.err) == (2, "scion-and-rootstock is missing. Run `make setup`.\n")
        assert list(home.iterdir()) == []


async def test_a_stack_is_started_shown_and_stopped_in_json() -> None:
    with short_home() as home:
        nothing, idle = await asyncio.gather(
            graft("status", "--json", GRAFT_HOME=home), graft("down", "--json", GRAFT_HOME=home)
        )
        assert (nothing.code, nothing.json) == (4, {"ready": False, "processes": []})
        assert idle.json == {"stopped": False}

        running = await up(home, "--json")
        try:
            out = await printed(running, f'{home}/logs"}}\n')
            *changes, ready = Ran(0, out, "").json_lines
            assert [(one["name"], one["state"]) for one in changes] == [
                ("only", "waiting"),
                ("only", "starting"),
                ("only", "ready"),
            ]
            assert changes[-1]["restarts"] == 0
            assert ready == {
                "ready": True,
                "grpc": "127.0.0.1:50051",
                "http": "http://127.0.0.1:8080/v1",
                "mlflow": "http://127.0.0.1:5000",
                "logs": f"{home}/logs",
            }
            assert (await graft("status", "--json", GRAFT_HOME=home)).json["ready"] is True
            again = await ended(await up(home, "--json"))
            assert (again.code, again.error["reason"]) == (2, "STACK_RUNNING")
            assert (await down(home, "--json")).json == {"stopped": True}
        finally:
            if running.returncode is None:
                running.terminate()
        assert (await ended(running)).json_lines[-1]["state"] == "stopped"


@pytest.mark.parametrize("arguments", [(), ("--detach",)])
async def test_a_home_that_is_too_deep_for_ray_is_refused_in_a_sentence(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    deep = tmp_path / ("d" * 60)
    text, as_json = await asyncio.gather(
        graft("up", *arguments, GRAFT_HOME=deep), graft("up", *arguments, "--json", GRAFT_HOME=deep)
    )
    assert (text.code, as_json.code) == (2, 2)
    assert text.err.startswith("GRAFT_HOME is too deep: ")
    assert text.err.count("\n") == 1
    assert (as_json.error["reason"], as_json.error["metadata"]) == ("HOME_TOO_DEEP", {"setting": "GRAFT_HOME"})
    assert not deep.exists()


async def test_ports_that_ray_keeps_and_ports_named_twice_are_refused_with_the_setting() -> None:
    with short_home() as home:
        reserved, dashboard, twice = await asyncio.gather(
            graft("up", GRAFT_HOME=home, GRAFT_RAY_PORT=15000),
            graft("up", "--json", GRAFT_HOME=home, GRAFT_RAY_DASHBOARD_PORT=10001),
            graft("up", "--json", GRAFT_HOME=home, GRAFT_REGISTRY_PORT=8080),
        )
    assert [each.code for each in (reserved, dashboard, twice)] == [2] * 3
    assert reserved.err.startswith("GRAFT_RAY_PORT is 15000, which Ray keeps ")
    assert dashboard.error["metadata"] == {"setting": "GRAFT_RAY_DASHBOARD_PORT"}
    assert dashboard.error["reason"] == "PORT_RESERVED"
    assert "GRAFT_REGISTRY_PORT" in twice.error["message"]
    assert "GRAFT_GATEWAY_HTTP_PORT" in twice.error["message"]


def test_the_deepest_home_that_is_let_through_leaves_room_for_rays_sockets() -> None:
    most = preflight.home_bytes(load({"GRAFT_HOME": "/h"}))
    home = "/" + "h" * (most - 1)
    preflight.check(load({"GRAFT_HOME": home}))
    # As Ray names them (ray/_private/node.py, ray/dashboard/subprocesses), with this machine's largest process id.
    largest_pid = Path("/proc/sys/kernel/pid_max").read_text().strip()
    socket = f"{home}/ray/session_2026-12-31_23-59-59_999999_{largest_pid}/sockets/dash_MetricsHead"
    assert len(os.fsencode(socket)) == 107
    with pytest.raises(FailedPrecondition, match="GRAFT_HOME"):
        preflight.check(load({"GRAFT_HOME": f"{home}h"}))
    # Bytes count, not characters.
    with pytest.raises(FailedPrecondition, match="GRAFT_HOME"):
        preflight.check(load({"GRAFT_HOME": f"{home[:-1]}ü"}))


@pytest.mark.parametrize("port", [10000, 20000])
def test_ports_beside_those_that_ray_keeps_are_let_through(port: int) -> None:
    preflight.check(load({"GRAFT_HOME": "/h", "GRAFT_RAY_PORT": str(port)}))


async def test_a_record_that_was_cut_short_by_a_power_cut_is_of_no_stack(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for left in ("", '{"pid": 1, "create'):
        (tmp_path / "run" / "stack.json").write_text(left)
        shown = await graft("status", "--json", GRAFT_HOME=tmp_path)
        assert (shown.code, shown.json) == (4, {"ready": False, "processes": []})


def test_a_token_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load({"GRAFT_HOME": str(tmp_path)})
    with monkeypatch.context() as patched:

        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patched.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space left"):
            ray_environment(settings)
    token = Path(ray_environment(settings)["RAY_AUTH_TOKEN_PATH"])
    assert len(token.read_text()) == 64
    assert token.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in token.parent.iterdir()] == [token.name]


def test_a_port_is_looked_for_at_an_address_of_either_kind() -> None:
    for host, family in (("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)):
        with socket.socket(family) as taken:
            try:
                taken.bind((host, 0))
            except OSError:
                continue  # a machine without IPv6
            taken.listen()
            number = taken.getsockname()[1]
            assert port_taken(Port(host, number, "GRAFT_X"))
        assert not port_taken(Port(host, number, "GRAFT_X"))
