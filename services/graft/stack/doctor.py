"""`graft doctor`: whether the local stack can run here, and whether the running one is well. Changes nothing.

Each check is one sentence and, when it is not ok, the fix. What the machine offers is in `graft.stack.machine`, what
the start itself refuses in `graft.stack.preflight`.
"""

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from graft.client.connection import Connection
from graft.domain.errors import FailedPrecondition, GraftError
from graft.registry.base_models import base_model_source
from graft.settings import Settings, load
from graft.stack import machine, preflight
from graft.stack.backends import check_backends
from graft.stack.local import read_status
from graft.stack.machine import Check, State
from graft.stack.processes import Port, Process, described, port_taken

ANSWER_SECONDS = 1.0


def examine(environment: Mapping[str, str] | None = None) -> list[Check]:
    """Every check. `environment` is `os.environ` when None."""
    environment = os.environ if environment is None else environment
    checks = [machine.check_python(), machine.check_packages(), machine.check_processor()]
    try:
        settings = load(environment)
    except GraftError as error:
        fix = "Correct the file or the variable that is named."
        return [*checks, Check("settings", State.FAIL, error.message, fix)]
    home = settings.home.path
    record = read_status(home)
    return [
        *checks,
        Check("settings", State.OK, f"The settings are valid, and GRAFT_HOME is {home}."),
        check_base_model(settings),
        machine.check_disk(home),
        machine.check_memory(running=record is not None),
        check_start(settings),
        *check_ports(settings, record),
        *check_backends(settings),
        *check_stack(settings, record),
        *check_gateway(settings, environment.get("GRAFT_ADDRESS", ""), running=record is not None),
    ]


def check_base_model(settings: Settings) -> Check:
    """The weights that serving will start with."""
    base = settings.serving.base_model
    try:
        source = base_model_source(settings, base)
    except GraftError as error:
        fix = "Run `make setup`, or set GRAFT_SERVING_BASE_MODEL to another model of the catalogue."
        return Check("base model", State.FAIL, error.message, fix)
    ready = "ready" if source.is_dir() else "here, to be converted at the first start"
    return Check("base model", State.OK, f"{base} is {ready}.")


def check_start(settings: Settings) -> Check:
    """What `graft up` refuses before it starts anything."""
    try:
        preflight.check(settings)
    except FailedPrecondition as error:
        return Check("start", State.FAIL, error.message, f"Change {error.metadata['setting']}.")
    return Check("start", State.OK, "Ray can start with these settings.")


def check_ports(settings: Settings, record: Mapping[str, Any] | None) -> Iterator[Check]:
    """Each port free, or held by the running stack of this home."""
    owners = _listeners()
    ours = _tree(record["pid"]) if record else set()
    for process in described(settings, {}):
        for port in process.ports:
            yield _check_port(port, process.name, owners, ours)


def _check_port(port: Port, process: str, owners: Mapping[int, int], ours: set[int]) -> Check:
    name = f"port {port.number}"
    if port_taken(port):
        owner = owners.get(port.number)
        if owner in ours:
            return Check(name, State.OK, f"Port {port.number} is held by this home's {process}.")
        holder = f"process {owner}" if owner else "a process of another user"
        text = f"Port {port.number} on {port.host}, which {process} needs, is taken by {holder}."
        return Check(name, State.FAIL, text, f"Free it, or set {port.setting} to another port.")
    if preflight.among_ray_workers(port):
        text = f"Port {port.number}, for {process}, is one that Ray's workers may take."
        return Check(name, State.WARN, text, f"Set {port.setting} to a port that is not in 10001 to 19999.")
    return Check(name, State.OK, f"Port {port.number}, for {process}, is free.")


def _listeners() -> dict[int, int]:
    """Port to process id, as far as this user may know."""
    return {
        one.laddr.port: one.pid
        for one in psutil.net_connections("tcp")
        if one.laddr and one.status == psutil.CONN_LISTEN and one.pid is not None
    }


def _tree(pid: int) -> set[int]:
    try:
        return {pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))}
    except psutil.NoSuchProcess:
        return set()


def check_stack(settings: Settings, record: Mapping[str, Any] | None) -> Iterator[Check]:
    """Each process of the running stack: what its supervisor says, and whether it answers now."""
    if record is None:
        yield Check("stack", State.OK, "No stack is running. Start one with `graft up`.")
        return
    told = {one["name"]: one for one in record["processes"]}
    processes = [process for process in described(settings, {}) if process.name in told]
    with ThreadPoolExecutor(len(processes)) as pool:
        answers = pool.map(lambda process: process.probe(), processes)
        for process, answer in zip(processes, answers, strict=True):
            yield _check_process(process, told[process.name], answers=answer)


def _check_process(process: Process, told: Mapping[str, Any], *, answers: bool) -> Check:
    fix = f"Read {told['log']}."
    restarts = f" It was restarted {told['restarts']} times." if told["restarts"] else ""
    if told["state"] != "ready":
        return Check(process.name, State.WARN, f"{process.name} is {told['state']}.{restarts}", fix)
    if not answers:
        return Check(process.name, State.FAIL, f"{process.name} was ready and does not answer.{restarts}", fix)
    if restarts:
        return Check(process.name, State.WARN, f"{process.name} answers.{restarts}", fix)
    return Check(process.name, State.OK, f"{process.name} answers.")


def check_gateway(settings: Settings, address: str, *, running: bool) -> Iterator[Check]:
    """The gateway that the other commands talk to, by gRPC's health service. Nothing where none is meant to run.

    `address` is GRAFT_ADDRESS, or empty for the home's own gateway.
    """
    if not address and not running:
        return
    connection = Connection(
        address or settings.gateway_address,
        root_certificate=None if address else settings.gateway.tls_certificate,
    )
    target, credentials = connection.target, connection.credentials
    channel = grpc.secure_channel(target, credentials) if credentials else grpc.insecure_channel(target)
    with channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=ANSWER_SECONDS)
        except grpc.RpcError as error:
            fix = "Correct GRAFT_ADDRESS, or start that gateway." if address else "See the gateway's log."
            yield Check("address", State.FAIL, f"No gateway answers at {target} ({error.code().name}).", fix)
            return
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        yield Check("address", State.OK, f"A gateway serves at {target}.")
    else:
        yield Check("address", State.WARN, f"The gateway at {target} does not serve yet.", "Wait, or see its log.")
