"""`/v1/chat/completions` and `/v1/completions`: bodies are passed to the engine, whose own handlers check them.

Beside OpenAI's fields a body may hold `inputs`, an object of texts, which take the place of messages or prompt.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from graft.gateway.errors import known
from graft.gateway.generation import refusal
from graft.gateway.http.errors import error_event
from graft.gateway.http.requests import core_of, invalid, json_object, project_of, until_disconnect
from graft.internal.v1 import engine_pb2

_DONE = b"data: [DONE]\n\n"


async def chat_completions(request: Request) -> Response:
    """Answers `messages`."""
    return await _answer(request, engine_pb2.ENDPOINT_CHAT_COMPLETIONS)


async def completions(request: Request) -> Response:
    """Answers `prompt`."""
    return await _answer(request, engine_pb2.ENDPOINT_COMPLETIONS)


async def _answer(request: Request, endpoint: engine_pb2.Endpoint.ValueType) -> Response:
    core, project = core_of(request), project_of(request)
    body = await json_object(request)
    stream = body.get("stream")
    if stream is not None and not isinstance(stream, bool):
        raise invalid("stream", "must be true or false")
    if stream:
        return EventStream(core.stream(project, endpoint, body))
    answer = await until_disconnect(request.receive, core.generate(project, endpoint, body))
    if answer.http_status != 200:
        raise refusal(answer.http_status, answer.body)
    return Response(answer.body, media_type="application/json")


class EventStream(Response):
    """Payloads as server-sent events, each sent when it comes; the client's leaving closes the payloads.

    The headers wait for the first payload, so that a refusal still has its own status. A failure after it is told as
    an event with OpenAI's error object, and `[DONE]` is then left out: half an answer must not look whole.
    """

    media_type = "text/event-stream"

    def __init__(self, payloads: AsyncGenerator[bytes, None]) -> None:
        # Proxies must neither keep nor gather the pieces.
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._payloads = payloads

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it all, or raises what came before the first payload."""
        await until_disconnect(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        async def piece(data: bytes) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": True})

        async with aclosing(self._payloads) as payloads:
            payload = await anext(payloads, None)
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                while payload is not None:
                    await piece(b"data: " + payload + b"\n\n")
                    payload = await anext(payloads, None)
                await piece(_DONE)
            except Exception as error:  # noqa: BLE001 - the status is sent: what fails now can only be told as an event
                await piece(error_event(known(error)))
        await send({"type": "http.response.body", "body": b"", "more_body": False})
