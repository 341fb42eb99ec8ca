"""A process on one host that goes on asking another for something, and says what becomes of it: the link may be cut.

    python -m tests.support.link_driver store URL
    python -m tests.support.link_driver storage ENDPOINT_URL
    python -m tests.support.link_driver engine ADDRESS

Prints a line of JSON at each change: `begun` when an answer has begun to come, `done`, or `failed` with the reason.
"""

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from graft.domain.errors import GraftError
from graft.internal.engine_client import EngineClient
from graft.internal.v1 import engine_pb2
from graft.settings import cache_folder
from graft.storage import Storage
from graft.store.sql import open_store

Say = Callable[[str], None]
Once = Callable[[Say], Awaitable[None]]
FILE_URI = "s3://graft/file"


def store(url: str) -> Once:
    opened = open_store(url)

    async def ping(_say: Say) -> None:
        await opened.ping()

    return ping


def storage(endpoint_url: str) -> Once:
    opened = Storage("s3://graft", endpoint_url)

    async def fetch(say: Say) -> None:
        say("begun")
        (await asyncio.to_thread(opened.fetch, FILE_URI)).unlink()

    return fetch


def engine(address: str) -> Once:
    client = EngineClient(address)

    async def stream(say: Say) -> None:
        async for _ in client.stream(engine_pb2.StreamRequest()):
            say("begun")

    return stream


async def main(kind: str, *arguments: str) -> None:
    """Until it is killed."""
    once = {"store": store, "storage": storage, "engine": engine}[kind](*arguments)
    last = ""

    def say(event: str, reason: str = "", message: str = "") -> None:
        nonlocal last
        if event + reason != last:
            last = event + reason
            print(json.dumps({"event": event, "reason": reason, "message": message, "at": time.time()}), flush=True)

    while True:
        try:
            await once(say)
            say("done")
        except GraftError as error:
            say("failed", error.reason, error.message)
        await asyncio.sleep(0.2)


if __name__ == "__main__":
    Path(cache_folder()).mkdir(parents=True, exist_ok=True)
    asyncio.run(main(*sys.argv[1:]))
