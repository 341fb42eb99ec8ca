"""What one process sees of another machine while the cable between them is pulled: an error in bounded time, and an
answer once it is plugged in again. Real servers on hosts of their own; `tests/e2e/hosts` has the whole system.

The cable is pulled once, from three processes in the middle of their work: most of a test's time is spent in silence.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from graft.store.sql import migrate
from tests.support.healing import Note
from tests.support.host_backends import POSTGRES_PORT, start_postgres, start_s3
from tests.support.hosts import Host, network
from tests.support.s3_server import S3Server

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


Drive = Callable[..., Driver]


@pytest.fixture(scope="module")
def drive(hosts: dict[str, Host]) -> Iterator[Drive]:
    drivers: list[Driver] = []

    def start(*arguments: str, **variables: str) -> Driver:
        drivers.append(Driver(hosts["worker"], list(arguments), variables))
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.stop()


@dataclass(frozen=True)
class Seen:
    """What a process said of the link while it was cut, and once it was whole again."""

    cut: float
    failed: list[dict[str, Any]]
    healed: float
    answered: dict[str, Any]

    def tell(self, note: Note, what: str) -> None:
        """Notes the first error and the first answer."""
        error_seconds, heal_seconds = self.failed[0]["at"] - self.cut, self.answered["at"] - self.healed
        note(what, error_seconds=error_seconds, told=self.failed[0]["reason"], heal_seconds=heal_seconds)


@pytest.fixture(scope="module")
def storage(hosts: dict[str, Host]) -> S3Server:
    return start_s3(hosts["server"], BYTES_A_SECOND)


@pytest.fixture(scope="module")
def seen(hosts: dict[str, Host], drive: Drive, storage: S3Server) -> dict[str, Seen]:
    worker, server = hosts.values()
    (url,) = start_postgres(server, "graft")
    migrate(url.replace(f"{server.address}:{POSTGRES_PORT}", f"127.0.0.1:{worker.tunnel(server, POSTGRES_PORT)}"))
    server.popen([sys.executable, "-c", ENGINE, f"{server.address}:9000"], "engine.log")
    server.listening(9000)
    with open(storage.folder / "graft" / "file", "wb") as file:
        file.truncate(FILE_BYTES)
    drivers = {"store": drive("store", url), "engine": drive("engine", f"{server.address}:9000")}
    drivers["store"].until("done")
    drivers["engine"].until("begun")
    drivers["storage"] = drive("storage", storage.endpoint_url, **storage.variables)
    drivers["storage"].until("begun")
    deadline = time.monotonic() + 120
    while not any(worker.files("home/cache/storage/.fetch-*/*").values()):
        assert time.monotonic() < deadline, "no download has begun"
        time.sleep(0.001)
    with worker.apart_from(server):
        cut = time.time()
        failed = {name: [driver.until("failed", "done")] for name, driver in drivers.items()}
        failed["engine"].append(drivers["engine"].until("failed"))
    healed = time.time()
    answered = {name: driver.until("begun" if name == "engine" else "done") for name, driver in drivers.items()}
    return {name: Seen(cut, failed[name], healed, answered[name]) for name in drivers}


def test_a_cut_link_to_the_database_is_an_error_and_then_an_answer(seen: dict[str, Seen], note: Note) -> None:
    assert [told["reason"] for told in seen["store"].failed] == ["STORE_UNAVAILABLE"]
    seen["store"].tell(note, "the database")


def test_a_download_from_the_storage_that_is_cut_is_an_error_and_then_whole(
    seen: dict[str, Seen], storage: S3Server, note: Note
) -> None:
    (failed,) = seen["storage"].failed
    assert failed["reason"] == "STORAGE_UNAVAILABLE", failed
    assert storage.endpoint_url in failed["message"]
    seen["storage"].tell(note, "the storage, in the middle of a download")


def test_a_silent_stream_from_the_engine_that_is_cut_is_lost_and_the_next_one_answered(
    seen: dict[str, Seen], note: Note
) -> None:
    # The next: nobody is reached at all.
    assert [told["reason"] for told in seen["engine"].failed] == ["ENGINE_LOST", "ENGINE_STARTING"]
    seen["engine"].tell(note, "the engine, in the middle of a stream")
