"""A `multipart/form-data` body as a stream of small fields and pieces of files, in the order in which they come.

Starlette's own parser spools whole files to a temporary folder first; this one hands pieces on and keeps nothing.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from graft.domain.errors import InvalidArgument

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MAX_FIELD_BYTES = 8 * 1024
"""No field of OpenAI's forms but the file itself is longer than a few words."""
MAX_PARTS = 32


@dataclass(frozen=True)
class Field:
    """A whole field that is not a file."""

    name: str
    value: str


@dataclass(frozen=True)
class FileStart:
    """A file begins; its pieces follow."""

    name: str
    filename: str


@dataclass(frozen=True)
class FilePiece:
    """The next bytes of the file that began last."""

    data: bytes


Piece = Field | FileStart | FilePiece


def _bad(message: str) -> InvalidArgument:
    return InvalidArgument(message, reason="BAD_FORM")


async def pieces(request: Request) -> AsyncIterator[Piece]:
    """Parses the body as it arrives. Raises InvalidArgument for one that is malformed or cut short."""
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise _bad("Send the file as multipart/form-data with a boundary, in a part named 'file'.")
    collector = _Collector()
    try:
        parser = MultipartParser(options[b"boundary"], collector.callbacks())
        async for chunk in request.stream():
            parser.write(chunk)
            for piece in collector.taken():
                yield piece
        parser.finalize()
    except FormParserError as error:
        raise _bad(f"The multipart body is malformed: {error}.") from None
    if not collector.ended:
        raise _bad("The multipart body ends before its closing boundary; it was cut short.")


@dataclass
class _Part:
    header_name: bytes = b""
    header_value: bytes = b""
    disposition: bytes = b""
    name: str = ""
    is_file: bool = False
    value: bytearray = field(default_factory=bytearray)


class _Collector:
    """The parser's callbacks. They may not wait, so what they find is kept until the chunk has been parsed."""

    def __init__(self) -> None:
        self.ended = False
        self._part = _Part()
        self._parts = 0
        self._found: list[Piece] = []
        self._data = bytearray()

    def callbacks(self) -> "MultipartCallbacks":
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._take,
            "on_part_end": self._end,
            "on_end": self._finish,
        }

    def taken(self) -> list[Piece]:
        """What was found since the last call; neighbouring bytes of a file as one piece."""
        self._flush()
        found, self._found = self._found, []
        return found

    def _flush(self) -> None:
        if self._data:
            self._found.append(FilePiece(bytes(self._data)))
            self._data.clear()

    def _begin(self) -> None:
        self._part = _Part()
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise _bad(f"The form has more than {MAX_PARTS} parts.")

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._part.header_name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._part.header_value += data[start:end]

    def _header_end(self) -> None:
        if self._part.header_name.lower() == b"content-disposition":
            self._part.disposition = self._part.header_value
        self._part.header_name = self._part.header_value = b""

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._part.disposition)
        if b"name" not in options:
            raise _bad("A part of the form has no name in its Content-Disposition.")
        self._part.name = options[b"name"].decode(errors="replace")
        self._part.is_file = b"filename" in options
        if self._part.is_file:
            self._found.append(FileStart(self._part.name, options[b"filename"].decode(errors="replace")))

    def _take(self, data: bytes, start: int, end: int) -> None:
        if self._part.is_file:
            self._data += data[start:end]
            return
        self._part.value += data[start:end]
        if len(self._part.value) > MAX_FIELD_BYTES:
            raise _bad(f"Field {self._part.name!r} is longer than {MAX_FIELD_BYTES} bytes.")

    def _end(self) -> None:
        self._flush()
        if not self._part.is_file:
            self._found.append(Field(self._part.name, self._part.value.decode(errors="replace")))

    def _finish(self) -> None:
        self.ended = True
