"""Chat and completions through the unmodified `openai` client, and what surrounds every request of the HTTP edge."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest

from graft.domain.errors import GraftError, InvalidArgument, ResourceExhausted, Unavailable
from graft.gateway import generation
from graft.gateway.auth import key_hash
from graft.internal.v1 import engine_pb2
from tests.support.fake_engine import FakeEngine
from tests.support.gateways import BASE, eventually
from tests.support.http_gateways import HttpGateway, http_gateway

SAID: list[Any] = [{"role": "user", "content": "hello"}]


class SlowEngine:
    """Replaces FakeEngine.Stream: says that it has begun, brings pieces apart, and knows when it was cut off."""

    def __init__(
        self,
        pause_seconds: float,
        fail_after: int = -1,
        error: GraftError | None = None,
        turns: asyncio.Semaphore | None = None,
    ) -> None:
        self.turns = turns
        """Each piece waits for one."""
        self.began = asyncio.Event()
        self.ended = asyncio.Event()
        self._pause_seconds = pause_seconds
        self._fail_after = fail_after
        self._error = error

    async def stream(self, _request: engine_pb2.GenerateRequest) -> AsyncIterator[bytes]:
        try:
            self.began.set()
            for number in range(1000):
                if number == self._fail_after and self._error is not None:
                    raise self._error
                if self.turns is not None:
                    await self.turns.acquire()
                choice = {"index": 0, "finish_reason": None, "delta": {"content": f"w{number} "}}
                body = {"id": "c", "object": "chat.completion.chunk", "created": 0, "model": BASE, "choices": [choice]}
                yield json.dumps(body).encode()
                await asyncio.sleep(self._pause_seconds)
        finally:
            self.ended.set()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> "SlowEngine":
        def stream(_engine: object, _resolution: object, _endpoint: object, body: Any) -> AsyncIterator[bytes]:
            return self.stream(body)

        monkeypatch.setattr(generation, "stream", stream)
        return self


async def chat(it: HttpGateway, model: str = BASE, **fields: Any) -> Any:
    return await it.client.chat.completions.create(model=model, messages=SAID, **fields)


async def test_a_chat_is_answered_by_the_adapter_that_its_model_names(tmp_path: Path) -> None:
    async with http_gateway(tmp_path) as it:
        answered = await chat(it, f"{BASE}:reviews", temperature=0.5)
        assert answered.choices[0].message.content == f"[{BASE}:reviews@3] hello"
        assert answered.model == f"{BASE}:reviews@3"
        assert answered.usage.total_tokens == 8
        assert (await chat(it, f"{BASE}:reviews@1")).model == f"{BASE}:reviews@1"
        assert (await chat(it)).choices[0].message.content == "[base] hello"
        request, body = it.engine.requests[0]
        assert body["temperature"] == 0.5
        assert request.request_id.startswith("req-")


async def test_a_completion_is_answered_whole_and_streamed(tmp_path: Path) -> None:
    async with http_gateway(tmp_path) as it:
        whole = await it.client.completions.create(model=f"{BASE}:reviews", prompt="say")
        assert whole.choices[0].text == f"[{BASE}:reviews@3] say"
        stream = await it.client.completions.create(model=BASE, prompt="say", stream=True)
        assert [piece.choices[0].text async for piece in stream] == ["[base] ", "one", " two", " three"]


async def test_a_streamed_chat_ends_with_its_usage_and_done(tmp_path: Path) -> None:
    async with http_gateway(tmp_path) as it:
        stream = await chat(it, stream=True, stream_options={"include_usage": True})
        pieces = [piece async for piece in stream]
        assert "".join(piece.choices[0].delta.content for piece in pieces[:-1]) == "[base] one two three"
        assert pieces[-1].usage.total_tokens == 7
        raw = await it.raw.post("/v1/chat/completions", json={"model": BASE, "messages": SAID, "stream": True})
        assert raw.headers["content-type"].startswith("text/event-stream")
        assert raw.text.endswith("\n\ndata: [DONE]\n\n")


async def test_a_streamed_chat_comes_token_by_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = asyncio.Semaphore(1)
    SlowEngine(0.0, turns=turns).install(monkeypatch)
    async with http_gateway(tmp_path) as it, asyncio.timeout(60):
        stream = await chat(it, stream=True)
        for number in range(6):
            # The next one is made when this one has come.
            assert (await anext(aiter(stream))).choices[0].delta.content == f"w{number} "
            turns.release()
        await stream.close()


async def test_a_client_that_leaves_ends_the_engines_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = SlowEngine(0.02).install(monkeypatch)
    async with http_gateway(tmp_path) as it:
        stream = await chat(it, stream=True)
        await anext(aiter(stream))
        assert not engine.ended.is_set()
        await stream.close()
        await asyncio.wait_for(engine.ended.wait(), 20)


async def test_a_client_that_leaves_before_the_first_token_or_a_whole_answer_cancels_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, ended = [], []

    async def endless(*_: Any) -> engine_pb2.GenerateResponse:
        began.append(1)
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(1)
        raise AssertionError

    async def endless_stream(*_: Any) -> AsyncIterator[engine_pb2.StreamResponse]:
        await endless()
        yield engine_pb2.StreamResponse()

    monkeypatch.setattr(FakeEngine, "Generate", endless)
    monkeypatch.setattr(FakeEngine, "Stream", endless_stream)
    async with http_gateway(tmp_path) as it:
        for number, stream in enumerate((False, True), start=1):
            asked = asyncio.create_task(chat(it, stream=stream))
            await eventually(lambda number=number: len(began) == number)
            asked.cancel()
            await eventually(lambda number=number: len(ended) == number)


async def test_a_failure_in_the_middle_of_a_stream_is_an_event_without_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = Unavailable("The engine went away.", reason="ENGINE_LOST", retry_after_seconds=2)
    SlowEngine(0.0, 2, lost).install(monkeypatch)
    async with http_gateway(tmp_path) as it:
        stream = aiter(await chat(it, stream=True))
        words = [(await anext(stream)).choices[0].delta.content for _ in range(2)]
        with pytest.raises(openai.APIError, match="went away"):
            await anext(stream)
        assert words == ["w0 ", "w1 "]
        raw = await it.raw.post("/v1/chat/completions", json={"model": BASE, "messages": SAID, "stream": True})
        last = raw.text.strip().rsplit("data: ", 1)[1]
        assert json.loads(last)["error"]["code"] == "engine_lost"
        assert "[DONE]" not in raw.text


async def test_while_the_engine_is_down_the_answer_is_503_with_a_retry_hint(tmp_path: Path) -> None:
    async with http_gateway(tmp_path, engine_address="127.0.0.1:1") as it:
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError) as caught:
                await chat(it, stream=stream)
            assert caught.value.status_code == 503
            assert caught.value.response.headers["retry-after"] == "2"
            assert caught.value.code == "engine_starting"
        ready = await it.raw.get("/readyz")
        assert ready.status_code == 503
        assert ready.json()["store"] == "ready"
        assert "starting" in ready.json()["engine"]


async def test_readiness_needs_a_ready_replica_and_health_does_not(tmp_path: Path) -> None:
    async with http_gateway(tmp_path) as it:
        assert (await it.raw.get("/readyz")).json() == {"ready": True, "store": "ready", "engine": "ready"}
        it.engine.replica.ready = False
        assert (await it.raw.get("/readyz")).status_code == 503
        assert (await it.raw.get("/healthz")).status_code == 200


@pytest.mark.parametrize(
    ("model", "status", "told"),
    [
        ("nothing", 404, BASE),
        (f"{BASE}:nothing", 404, "reviews"),
        (f"{BASE}:reviews@9", 404, "reviews"),
        (f"{BASE}:reviews@nobody", 404, "champion"),
        ("Not A Name!", 400, "not a name"),
        ("", 400, "model"),
    ],
)
async def test_a_model_that_does_not_exist_is_refused_naming_what_does(
    tmp_path: Path, model: str, status: int, told: str
) -> None:
    async with http_gateway(tmp_path) as it:
        with pytest.raises(openai.APIStatusError) as caught:
            await chat(it, model, stream=True)
        assert caught.value.status_code == status
        assert told in str(caught.value)
        assert caught.value.type == "invalid_request_error"


async def test_what_the_engine_refuses_keeps_its_status_message_and_param(tmp_path: Path) -> None:
    async with http_gateway(tmp_path) as it:
        it.engine.refuse = 400
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError) as caught:
                await chat(it, stream=stream)
            assert "top_p must be" in caught.value.message
            assert (caught.value.param, caught.value.type) == ("top_p", "invalid_request_error")


async def test_a_full_queue_is_429_with_a_retry_hint(tmp_path: Path) -> None:
    async with http_gateway(tmp_path) as it:
        it.engine.error = ResourceExhausted("The queue is full.", reason="ENGINE_LIMIT", retry_after_seconds=0.4)
        with pytest.raises(openai.RateLimitError) as caught:
            await chat(it)
        assert caught.value.response.headers["retry-after"] == "1"


async def test_a_message_that_is_too_large_for_the_engine_is_413_and_not_to_be_repeated(tmp_path: Path) -> None:
    async with http_gateway(tmp_path) as it:
        it.engine.error = InvalidArgument("Too large.", reason="ENGINE_REQUEST_TOO_LARGE")
        with pytest.raises(openai.APIStatusError) as caught:
            await chat(it)
        assert caught.value.status_code == 413
        assert caught.value.response.headers["x-should-retry"] == "false"
        it.engine.error = InvalidArgument("Too large.", reason="ENGINE_ANSWER_TOO_LARGE")
        with pytest.raises(openai.BadRequestError):
            await chat(it)


async def test_a_body_that_is_no_json_object_is_refused(tmp_path: Path) -> None:
    async with http_gateway(tmp_path) as it:
        bodies = (b"{", b"[]", b"", b"\xff", b"[" * 100_000, b'{"model": "\\ud800"}', b'{"model": "m", "stream": 1}')
        for body in bodies:
            answered = await it.raw.post("/v1/chat/completions", content=body)
            assert answered.status_code == 400, body[:20]
            assert set(answered.json()["error"]) == {"message", "type", "param", "code"}


async def test_a_body_over_the_limit_is_413_however_it_is_sent(tmp_path: Path) -> None:
    async with http_gateway(tmp_path) as it:
        large = json.dumps({"model": BASE, "prompt": "x" * 5 * 1024 * 1024}).encode()

        async def chunked() -> AsyncIterator[bytes]:
            for start in range(0, len(large), 65536):
                yield large[start : start + 65536]

        for content in (large, chunked()):
            answered = await it.raw.post("/v1/completions", content=content)
            assert answered.status_code == 413
            assert "4 MiB" in answered.json()["error"]["message"]
        assert it.engine.requests == []


async def test_unknown_paths_and_methods_are_told_in_openais_words_with_a_request_id(tmp_path: Path) -> None:
    async with http_gateway(tmp_path) as it:
        unknown = await it.raw.get("/v1/embeddings")
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "unknown_url")
        wrong = await it.raw.delete("/v1/files")
        assert wrong.status_code == 405
        assert "GET" in wrong.json()["error"]["message"]
        assert "POST" in wrong.json()["error"]["message"]
        ids = {answer.headers["x-request-id"] for answer in (unknown, wrong, await it.raw.get("/healthz"))}
        assert len(ids) == 3


async def test_a_defect_is_500_with_the_request_id_and_nothing_of_its_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with http_gateway(tmp_path) as it:

        async def broken() -> None:
            raise ValueError("secret detail")

        monkeypatch.setattr(it.store, "list_base_models", broken)
        answered = await it.raw.get("/v1/models")
        assert answered.status_code == 500
        assert answered.headers["x-request-id"] in answered.json()["error"]["message"]
        assert "secret" not in answered.text


async def test_beyond_loopback_a_key_is_demanded_and_opens_its_own_project_only(tmp_path: Path) -> None:
    async with http_gateway(tmp_path, guarded=True) as it:
        await it.store.add_key(key_hash("right"), "default", "test")
        await it.store.add_key(key_hash("other"), "elsewhere", "test")
        with pytest.raises(openai.AuthenticationError) as caught:
            await it.client.models.list()
        assert caught.value.code == "invalid_api_key"
        assert (await it.raw.get("/v1/models")).status_code == 401
        assert (await it.raw.get("/healthz")).status_code == 200
        assert len((await it.client.with_options(api_key="right").models.list()).data) == 3
        other = it.client.with_options(api_key="other")
        assert [model.id for model in (await other.models.list()).data] == [BASE]
        with pytest.raises(openai.PermissionDeniedError):
            await other.with_options(project="default").models.list()


async def test_models_are_listed_and_found_by_every_kind_of_name(tmp_path: Path) -> None:
    async with http_gateway(tmp_path) as it:
        listed = [model async for model in it.client.models.list()]
        assert [model.id for model in listed] == [BASE, f"{BASE}:reviews", f"{BASE}:reviews@3"]
        assert all(type(model).model_validate(model.to_dict()) for model in listed)
        for name in (BASE, f"{BASE}:reviews", f"{BASE}:reviews@1", f"{BASE}:reviews@champion"):
            assert (await it.client.models.retrieve(name)).id == name
        with pytest.raises(openai.NotFoundError, match="reviews"):
            await it.client.models.retrieve(f"{BASE}:nothing")
        with pytest.raises(openai.BadRequestError):
            await it.client.models.retrieve("meta/llama")


async def test_requests_are_counted_by_route_and_status(tmp_path: Path) -> None:
    async with http_gateway(tmp_path) as it:
        await it.client.models.retrieve(BASE)
        shown = (await it.raw.get("/metrics")).text
        line = 'graft_gateway_requests_total{code="200",method="GET /v1/models/{model:path}",protocol="http"}'
        assert line in shown
        assert 'graft_gateway_request_seconds_count{method="GET /v1/models/{model:path}",protocol="http"}' in shown


async def test_the_synchronous_client_works_too(tmp_path: Path) -> None:
    async with http_gateway(tmp_path) as it:

        def ask() -> list[str]:
            with openai.OpenAI(base_url=f"{it.url}/v1", api_key="any", max_retries=0) as client:
                stream = client.chat.completions.create(model=BASE, messages=SAID, stream=True)
                return [piece.choices[0].delta.content or "" for piece in stream]

        assert await asyncio.to_thread(ask) == ["[base] ", "one", " two", " three"]


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://page.example"},
        {"origin": "null"},  # of a page in a sandbox, or from a file
        {"host": "page.example"},  # a name of the page's own that leads here: DNS rebinding
        {"host": "page.example:8080", "origin": "http://page.example:8080"},
        {"host": "[bad"},
    ],
)
async def test_without_keys_pages_of_the_web_are_not_answered(tmp_path: Path, headers: dict[str, str]) -> None:
    async with http_gateway(tmp_path) as it:
        for request in (it.raw.get("/v1/models", headers=headers), it.raw.post("/v1/files", headers=headers)):
            answer = await request
            assert answer.status_code == 403
            assert answer.json()["error"]["code"] == "not_local"
        assert (await it.raw.get("/healthz", headers=headers)).status_code == 200


async def test_without_keys_this_machine_is_answered_under_each_of_its_names_and_with_keys_under_any(
    tmp_path: Path,
) -> None:
    async with http_gateway(tmp_path) as it:
        for host in ("localhost", "127.0.0.1:1", "[::1]:8080", "graft.localhost"):
            answer = await it.raw.get("/v1/models", headers={"host": host, "origin": f"http://{host}"})
            assert answer.status_code == 200
    async with http_gateway(tmp_path / "guarded", guarded=True) as it:
        await it.store.add_key(key_hash("secret"), "default", "test")
        named = {"host": "graft.example", "origin": "https://page.example", "authorization": "Bearer secret"}
        assert (await it.raw.get("/v1/models", headers=named)).status_code == 200
