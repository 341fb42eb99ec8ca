"""Graft's own objects over HTTP: the contract's messages as JSON (proto3's mapping) under the contract's names.

So a 64-bit number is a string, and a field that has its default is left out.
"""

from typing import Any, TypeVar

from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
from google.protobuf.message import Message

from graft.domain.errors import InvalidArgument
from graft.gateway.http.requests import invalid

MessageT = TypeVar("MessageT", bound=Message)


def told(kind: str, id: str, message: Message) -> dict[str, Any]:
    """The message with the `id` and the `object` that OpenAI's clients expect of each."""
    return {"id": id, "object": kind, **MessageToDict(message, preserving_proto_field_name=True)}


def parsed(body: dict[str, object], into: MessageT, kind: str, in_path: tuple[str, ...] = ()) -> MessageT:
    """The body as the message `into`, which it fills. Raises InvalidArgument for a field that the message does not have
    or that does not fit, and for one that the path tells."""
    for name in in_path:
        if name in body:
            raise invalid(name, "is told by the path and the project's header; leave it out")
    try:
        return ParseDict(body, into)
    except ParseError as error:
        raise InvalidArgument(f"The body is no {kind}: {error}.", reason=f"INVALID_{kind.upper()}") from None
