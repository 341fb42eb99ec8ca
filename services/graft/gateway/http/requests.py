"""What endpoints ask of a request: its project, its JSON body within the limit, its query, and whether its client is
still there."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from graft.domain.errors import FieldViolation, InvalidArgument, NotFound, ResourceExhausted
from graft.domain.names import check_id
from graft.gateway import auth
from graft.gateway.checks import MAX_PAGE_SIZE
from graft.gateway.core import Core
from graft.settings import MIB
from graft.store.protocol import Listed, Page

T = TypeVar("T")
ListedT = TypeVar("ListedT", bound=Listed)


def core_of(request: Request) -> Core:
    """The core that the application was built over."""
    core: Core = request.app.state.core
    return core


def project_of(request: Request) -> str:
    """The project of the `OpenAI-Project` header, which the client's key must open, or the key's own."""
    principal = auth.current()
    named = request.headers.get("openai-project")
    return principal.check(check_id(named, "OpenAI-Project")) if named else principal.default_project()


def idempotency_key(request: Request) -> str | None:
    """The `Idempotency-Key` header: a repeated create with the same key returns the first one's result."""
    return request.headers.get("idempotency-key") or None


def invalid(param: str, description: str, reason: str = "INVALID_REQUEST") -> InvalidArgument:
    """A refusal with one parameter at fault."""
    return InvalidArgument(
        f"{param}: {description.rstrip('.')}.", reason=reason, violations=(FieldViolation(param, description),)
    )


# Bodies


async def json_object(request: Request) -> dict[str, object]:
    """The body as a JSON object. Raises InvalidArgument, or ResourceExhausted as soon as the limit is passed."""
    body = await _body(request, core_of(request).settings.gateway.max_message_bytes)
    try:
        parsed = json.loads(body)
        if b"\\u" in body:  # a lone surrogate is legal JSON but no text: it could be neither stored nor sent on
            json.dumps(parsed, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InvalidArgument("The body has a lone surrogate (\\ud800 to \\udfff).", reason="BAD_JSON") from None
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"The body is not JSON: {error}.", reason="BAD_JSON") from None
    if not isinstance(parsed, dict):
        raise InvalidArgument("The body must be a JSON object.", reason="BAD_JSON")
    return parsed


async def _body(request: Request, limit: int) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise _too_large(limit)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise _too_large(limit)
    return bytes(body)


def _too_large(limit: int) -> ResourceExhausted:
    return ResourceExhausted(
        f"The body is larger than the limit of {limit / MIB:g} MiB ({limit} bytes). Send less, or raise "
        "GRAFT_GATEWAY_MAX_MESSAGE_BYTES.",
        reason="BODY_TOO_LARGE",
        metadata={"max_message_bytes": str(limit)},
    )


# Lists


def query_of(request: Request, *known: str) -> dict[str, str]:
    """The query's parameters. Raises InvalidArgument for one that this list cannot honour."""
    for name in request.query_params:
        if name not in known:
            raise invalid(name, f"is not supported here; supported: {', '.join(known)}")
    return dict(request.query_params)


def limit_of(query: dict[str, str], default: int, most: int) -> int:
    """`limit`, from 1 to `most`. Raises InvalidArgument."""
    asked = query.get("limit", str(default))
    if not (asked.isascii() and asked.isdecimal() and len(asked) < 9 and 1 <= int(asked) <= most):
        raise invalid("limit", f"{asked!r} is not a whole number from 1 to {most}")
    return int(asked)


async def page_after(
    core: Core,
    fetch: Callable[[int, str], Awaitable[Page[ListedT]]],
    after: str | None,
    limit: int,
    find: Callable[[str], Awaitable[ListedT]],
) -> tuple[list[ListedT], bool]:
    """Up to `limit` items that follow the one with id `after`, which `find` finds, and whether there are more."""
    token = ""
    if after is not None:
        try:
            token = core.store.token_after(await find(after))
        except (NotFound, InvalidArgument):
            raise invalid("after", f"{after!r} is not in this list") from None
    page = await fetch(min(limit, MAX_PAGE_SIZE), token)
    return list(page.items), bool(page.next_page_token)


async def page(
    request: Request,
    fetch: Callable[[int, str], Awaitable[Page[ListedT]]],
    find: Callable[[str], Awaitable[ListedT]],
) -> tuple[list[ListedT], bool]:
    """The page of a list of Graft's own that the query asks for by `after` and `limit` (20, at most 100)."""
    query = query_of(request, "after", "limit")
    return await page_after(core_of(request), fetch, query.get("after"), limit_of(query, 20, 100), find)


def listing(data: list[dict[str, object]], has_more: bool) -> dict[str, object]:
    """OpenAI's list object."""
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": has_more,
    }


# Clients that leave


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled as soon as the client leaves. Raises ClientDisconnect then.

    To be called when the request's body has been read.
    """
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
