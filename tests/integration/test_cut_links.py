"""What one process sees of another machine while the cable between them is pulled: an error in bounded time, and an
answer once it is plugged in again. Real servers on hosts of their own; `tests/e2e/hosts` has the whole system.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from graft.store.sql import migrate
from tests.support.healing import Note
from tests.support.host_backends import POSTGRES_PORT, start_postgres, start_s3
from tests.support.hosts import Host, network

pytestmark = [pytest.mark.integration, pytest.mark.timeout(280)]

FILE_BYTES, BYTES_A_SECOND = 40_000_000, "10M"
"""Four seconds, of which the cable is pulled in the first."""
ENGINE = """
import asyncio, sys, grpc
from graft.internal.v1 import engine_pb2, engine_pb2_grpc
class Engine(engine_pb2_grpc.EngineServicer):
    async def Stream(self, request, context):
        yield engine_pb2.StreamResponse(data=b"{}", http_status=200)
        await asyncio.sleep(3600)  # nothing is sent by which a cut would be noticed
async def main():
    server = grpc.aio.server()
    engine_pb2_grpc.add_EngineServicer_to_server(Engine(), server)
    server.add_insecure_port(sys.argv[1])
    await server.start()
    await server.wait_for_termination()
asyncio.run(main())
"""


class Driver:
    """`tests.support.link_driver` on a host."""

    def __init__(self, host: Host, arguments: list[str], variables: Mapping[str, str]) -> None:
        self._host = host
        self._process = subprocess.Popen(
            host.command([sys.executable, "-m", "tests.support.link_driver", *arguments]),
            env=host.environment(variables),
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def until(self, *events: str) -> dict[str, Any]:
        """Waits for one of these events; whatever hangs ends with the test's own time."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            told: dict[str, Any] = json.loads(line)
            if told["event"] in events:
                return told
        raise AssertionError(f"The driver has ended.\n{self._host.last_lines()}")

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="module")
def hosts() -> Iterator[dict[str, Host]]:
    with network("worker", "server") as made:
        yield made


def tell(note: Note, what: str, cut: float, failed: dict[str, Any], healed: float, answered: dict[str, Any]) -> None:
    note(what, error_seconds=failed["at"] - cut, told=failed["reason"], heal_seconds=answered["at"] - healed)


Drive = Callable[..., Driver]


@pytest.fixture
def drive(hosts: dict[str, Host]) -> Iterator[Drive]:
    drivers: list[Driver] = []

    def start(*arguments: str, **variables: str) -> Driver:
        drivers.append(Driver(hosts["worker"], list(arguments), variables))
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.stop()


def test_a_cut_link_to_the_database_is_an_error_and_then_an_answer(
    hosts: dict[str, Host], drive: Drive, note: Note
) -> None:
    worker, server = hosts.values()
    (url,) = start_postgres(server, "graft")
    migrate(url.replace(f"{server.address}:{POSTGRES_PORT}", f"127.0.0.1:{worker.tunnel(server, POSTGRES_PORT)}"))
    driver = drive("store", url)
    driver.until("done")
    with worker.apart_from(server):
        cut = time.time()
        failed = driver.until("failed")
    healed = time.time()
    answered = driver.until("done")
    assert failed["reason"] == "STORE_UNAVAILABLE"
    tell(note, "the database", cut, failed, healed, answered)


def test_a_download_from_the_storage_that_is_cut_is_an_error_and_then_whole(
    hosts: dict[str, Host], drive: Drive, note: Note
) -> None:
    worker, server = hosts.values()
    s3 = start_s3(server, BYTES_A_SECOND)
    with open(s3.folder / "graft" / "file", "wb") as file:
        file.truncate(FILE_BYTES)
    driver = drive("storage", s3.endpoint_url, **s3.variables)
    driver.until("begun")
    deadline = time.monotonic() + 120
    while not (begun := [found for found in worker.disk.rglob("cache/storage/.fetch-*/*") if found.stat().st_size]):
        assert time.monotonic() < deadline, "no download has begun"
        time.sleep(0.001)
    with worker.apart_from(server):
        cut = time.time()
        failed = driver.until("failed", "done")
    healed = time.time()
    assert failed["reason"] == "STORAGE_UNAVAILABLE", (failed, begun)
    assert s3.endpoint_url in failed["message"]
    answered = driver.until("done")
    tell(note, "the storage, in the middle of a download", cut, failed, healed, answered)


def test_a_silent_stream_from_the_engine_that_is_cut_is_lost_and_the_next_one_answered(
    hosts: dict[str, Host], drive: Drive, note: Note
) -> None:
    worker, server = hosts.values()
    server.popen([sys.executable, "-c", ENGINE, f"{server.address}:9000"], "engine.log")
    server.listening(9000)
    driver = drive("engine", f"{server.address}:9000")
    driver.until("begun")
    with worker.apart_from(server):
        cut = time.time()
        failed = driver.until("failed")
        assert failed["reason"] == "ENGINE_LOST"
        assert driver.until("failed")["reason"] == "ENGINE_STARTING"  # the next: nobody is reached at all
    healed = time.time()
    answered = driver.until("begun")
    tell(note, "the engine, in the middle of a stream", cut, failed, healed, answered)
