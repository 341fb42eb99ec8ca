"""Blocking calls beside the event loop, and waits that a cancellation must not cut in two."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import ParamSpec, TypeVar

from graft.domain.errors import Unavailable

P = ParamSpec("P")
T = TypeVar("T")


async def call(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Runs `function` in a daemon thread of its own and returns what it returns.

    Not asyncio's executor: its few threads (cores + 4) would all be taken by calls to an MLflow that does not answer,
    and it makes a process that wants to end wait for them. A cancelled caller leaves the thread to finish unheard.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type] # None only where T allows it

    def work() -> None:
        result: T | None = None
        error: BaseException | None = None
        try:
            result = function(*args, **kwargs)
        except BaseException as caught:  # noqa: BLE001 - handed to the caller
            # A future refuses StopIteration; nothing that is called here means it.
            error = RuntimeError(repr(caught)) if isinstance(caught, StopIteration) else caught
        with suppress(RuntimeError):  # the loop is closed: the process is ending and nobody listens
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=work, daemon=True, name=getattr(function, "__name__", "call")).start()
    return await future


async def ask_ray(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Calls Ray in a thread. Raises Unavailable when Ray itself does not answer."""
    try:
        return await call(function, *args, **kwargs)
    except Exception as error:
        # Ray's own exceptions are known by their module: importing ray here would cost every test two seconds. A
        # RayTaskError is what our code raised over there.
        of_ray = type(error).__module__.partition(".")[0] == "ray" and "RayTaskError" not in type(error).__name__
        if of_ray or isinstance(error, ConnectionError | TimeoutError):
            raise Unavailable(
                f"The training cluster does not answer ({type(error).__name__}).", reason="RAY_UNAVAILABLE"
            ) from error
        raise


async def to_the_end(awaitable: Awaitable[T]) -> T:
    """Awaits so that a cancellation takes effect only after `awaitable` has ended.

    For a write to the store and the start of a run: cut in two, nobody would know whether it happened.
    """
    task = asyncio.ensure_future(awaitable)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # heard, so that asyncio does not report it as lost
        raise
