"""Pages that fit into a message. Knows no resource."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from google.protobuf.message import Message

from graft.gateway.checks import check_page_size
from graft.gateway.core import Core
from graft.store.protocol import Page

T = TypeVar("T")
MessageT = TypeVar("MessageT", bound=Message)


async def fitting(
    core: Core, page_size: int, fetch: Callable[[int], Awaitable[Page[T]]], told: Callable[[Page[T]], MessageT]
) -> MessageT:
    """The page of so many, or of fewer (AIP-158) where that would be larger than gRPC sends and clients take: a job may
    have kilobytes of a task's definition, an evaluation megabytes of confusion matrices."""
    size = check_page_size(page_size)
    while True:
        response = told(await fetch(size))
        if size == 1 or response.ByteSize() <= core.settings.gateway.max_message_bytes:
            return response
        size //= 2
