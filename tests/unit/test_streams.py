"""A replica's stream: in what order its parts are let go when nobody listens any more."""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray.serve.grpc_util import RayServegRPCContext

from graft.internal.token import TakenTokens
from graft.internal.v1 import engine_pb2
from graft.serving.app import EngineReplica
from graft.serving.residency import Ref, Residency


class _Engine:
    """Holds whatever it is given, and answers without an end."""

    def __init__(self) -> None:
        self.in_use_at_the_end: list[int] = []
        self.residency = Residency(1, self, self)

    async def add(self, name: str, int_id: int, path: Path) -> None: ...
    async def remove(self, name: str, int_id: int) -> None: ...

    async def pull(self, ref: Ref) -> Path:
        return Path(ref.digest)

    async def stream(self, *_: object) -> AsyncGenerator[Any, None]:
        try:
            while True:
                yield SimpleNamespace(http_status=200, json=lambda: b"{}")
        finally:
            await asyncio.sleep(0)  # the engine is told
            self.in_use_at_the_end = [held.active_requests for held in self.residency.held()]


class _Replica(EngineReplica):
    def __del__(self) -> None:  # type: ignore[override]
        """Nothing to end: not even its constructor has run."""


async def test_an_adapter_is_in_use_until_the_engine_has_been_told_that_its_stream_has_ended() -> None:
    engine = _Engine()
    replica: Any = object.__new__(_Replica)
    replica.tokens = TakenTokens(None)  # it asks for none
    replica._base = SimpleNamespace(id="tiny")
    replica._keeper = SimpleNamespace(engine=lambda: engine)
    replica._residency = engine.residency
    adapter = engine_pb2.AdapterRef(model="tiny:a@1", digest="sha256:a", path="/a")
    asked = engine_pb2.GenerateRequest(endpoint=engine_pb2.ENDPOINT_COMPLETIONS, adapter=adapter)
    context = object.__new__(RayServegRPCContext)
    pieces = replica.Stream(engine_pb2.StreamRequest(request=asked), grpc_context=context)
    assert (await anext(pieces)).http_status == 200
    await pieces.aclose()
    assert engine.in_use_at_the_end == [1]
    assert [held.active_requests for held in engine.residency.held()] == [0]
