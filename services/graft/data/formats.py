"""Recognises and validates a data set file, line by line, in memory that does not grow with the file.

Two JSONL layouts: OpenAI chat rows (`messages`) and `prompt`/`completion` rows. Owns what a good row is; does not know
tokenizers (`graft.data.rendering`) or where files are kept.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.domain.errors import FieldViolation, InvalidArgument
from graft.domain.resources import DatasetFormat

MAX_LINE_BYTES = 1024 * 1024
"""A row beyond it exceeds every context by far (2048 tokens are some 8 KB of English)."""
REPORTED_LINES = 20
SHOWN_CHARACTERS = 80
"""Of a key or value quoted in a fault: it may be as long as its line."""
READ_BYTES = 1024 * 1024
ROLES = ("system", "user", "assistant")
_KEYS = {
    DatasetFormat.MESSAGES: frozenset({"messages"}),
    DatasetFormat.PROMPT_COMPLETION: frozenset({"prompt", "completion"}),
}
_BOM = b"\xef\xbb\xbf"

Fault = tuple[str, str]
"""Field within the row (empty for the row itself), and what is wrong."""


@dataclass(frozen=True)
class FileReport:
    """A file in which every line is good."""

    format: DatasetFormat
    row_count: int
    size_bytes: int
    digest: str
    """`sha256:<hex>` of the bytes."""


class JsonlValidator:
    """Validates a file that arrives in chunks of any size. Blank lines are skipped; CRLF and a BOM are accepted."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._size_bytes = 0
        self._rest = bytearray()
        self._skipping = False
        self._line = 0
        self._rows = 0
        self._bad_lines = 0
        self._format: DatasetFormat | None = None
        self._violations: list[FieldViolation] = []

    def feed(self, chunk: bytes) -> None:
        """Takes the next bytes. Remembers faults; raises nothing."""
        self._hash.update(chunk)
        self._size_bytes += len(chunk)
        first, *others = chunk.split(b"\n")
        # Grown in place: a long line in small pieces would otherwise be copied once a piece.
        self._rest += first
        for other in others:
            line, self._rest = bytes(self._rest), bytearray(other)
            self._end_line(line)
        if len(self._rest) > MAX_LINE_BYTES:
            # The rest of this line is dropped as it comes, so that one endless line cannot fill the memory.
            self._skipping = True
            del self._rest[1:]

    def finish(self) -> FileReport:
        """The report. Raises InvalidArgument (BAD_DATASET) with the count of all bad lines and the first 20."""
        if self._rest:
            self._end_line(bytes(self._rest))
            self._rest.clear()
        if self._bad_lines:
            first = "; ".join(f"{violation.field}: {violation.description}" for violation in self._violations)
            raise InvalidArgument(
                f"{self._bad_lines} of {self._line} lines are bad; nothing was stored. First: {first}",
                reason="BAD_DATASET",
                metadata={"bad_lines": str(self._bad_lines), "lines": str(self._line)},
                violations=tuple(self._violations),
            )
        if self._format is None:
            raise InvalidArgument(
                "The file has no rows. Write one JSON object a line.",
                reason="BAD_DATASET",
                metadata={"bad_lines": "0"},
                violations=(FieldViolation("line 1", "the file has no rows"),),
            )
        return FileReport(self._format, self._rows, self._size_bytes, f"sha256:{self._hash.hexdigest()}")

    def _end_line(self, line: bytes) -> None:
        self._line += 1
        if self._skipping or len(line) > MAX_LINE_BYTES:
            self._skipping = False
            self._bad([("", f"is longer than {MAX_LINE_BYTES} bytes")])
            return
        if self._line == 1:
            line = line.removeprefix(_BOM)
        line = line.rstrip(b"\r")
        if not line.strip():
            return
        self._rows += 1
        faults = self._row_faults(line)
        if faults:
            self._bad(faults)

    def _row_faults(self, line: bytes) -> list[Fault]:
        try:
            row = json.loads(line.decode("utf-8"), object_pairs_hook=_unique)
        except UnicodeDecodeError as error:
            return [("", f"is not UTF-8 (byte {error.start})")]
        except _DuplicateKey as error:
            return [(_shown(error.key), "occurs twice")]
        except json.JSONDecodeError as error:
            return [("", f"is not JSON: {error.msg} at column {error.colno}")]
        except ValueError:
            # The one that is left: Python reads no integer of more than 4300 digits.
            return [("", "has a number with too many digits")]
        except RecursionError:
            return [("", "is nested too deeply")]
        if not isinstance(row, dict):
            return [("", "is not a JSON object")]
        found = _recognise(row)
        if found is None:
            keys = ", ".join(_shown(key) for key in sorted(row)[:5]) or "none"
            return [("", f"is neither a `messages` nor a `prompt`/`completion` row; its keys: {keys}")]
        if self._format is None:
            self._format = found
        elif found is not self._format:
            return [("", f"is a {found} row in a {self._format} file; one file has one layout")]
        return [
            *((_shown(key), "is not a known key; remove it") for key in row if key not in _KEYS[found]),
            *(_message_faults(row["messages"]) if found is DatasetFormat.MESSAGES else _pair_faults(row)),
        ]

    def _bad(self, faults: list[Fault]) -> None:
        self._bad_lines += 1
        if self._bad_lines > REPORTED_LINES:
            return
        field, description = faults[0]
        where = f"line {self._line}" + (f": {field}" if field else "")
        more = f" (and {len(faults) - 1} more in this line)" if len(faults) > 1 else ""
        self._violations.append(FieldViolation(where, description + more))


def validate_file(path: Path) -> FileReport:
    """Validates a file on disk. Raises as `JsonlValidator.finish`, and OSError when it cannot be read."""
    validator = JsonlValidator()
    with open(path, "rb") as file:
        while chunk := file.read(READ_BYTES):
            validator.feed(chunk)
    return validator.finish()


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file that was validated before, one at a time."""
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


class _DuplicateKey(ValueError):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for key, value in pairs:
        if key in row:
            raise _DuplicateKey(key)
        row[key] = value
    return row


def _shown(text: str) -> str:
    """Safe to send on: short, and without the half characters that JSON can spell and UTF-8 cannot."""
    return text[:SHOWN_CHARACTERS].encode("utf-8", "replace").decode()


def _text_fault(text: Any) -> str | None:
    """What keeps a value from being a text that a tokenizer reads."""
    if not isinstance(text, str):
        return "is not a string"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"has half a surrogate pair (character {error.start}), which is no text"
    return None


def _recognise(row: dict[str, Any]) -> DatasetFormat | None:
    if "messages" in row:
        return DatasetFormat.MESSAGES
    if "prompt" in row or "completion" in row:
        return DatasetFormat.PROMPT_COMPLETION
    return None


def _pair_faults(row: dict[str, Any]) -> Iterator[Fault]:
    for key in ("prompt", "completion"):
        if key not in row:
            yield key, "is missing"
        elif fault := _text_fault(row[key]):
            yield key, fault
    if isinstance(row.get("completion"), str) and not row["completion"].strip():
        yield "completion", "is empty: there is nothing to learn"


def _message_faults(messages: Any) -> Iterator[Fault]:
    if not isinstance(messages, list) or not messages:
        yield "messages", "is not a list with at least one message"
        return
    learned = False
    for index, message in enumerate(messages):
        field = f"messages[{index}]"
        if not isinstance(message, dict):
            yield field, "is not an object"
            continue
        for key in message:
            if key not in ("role", "content", "weight"):
                yield f"{field}.{_shown(key)}", "is not a known key; remove it"
        role = message.get("role")
        if role not in ROLES:
            yield f"{field}.role", f"is {_shown(repr(role))}; it must be one of {', '.join(ROLES)}"
        elif role == "system" and index:
            yield f"{field}.role", "a system message must come first"
        content = message.get("content")
        if fault := _text_fault(content):
            yield f"{field}.content", fault
        elif role == "assistant" and not str(content).strip():
            yield f"{field}.content", "is empty: there is nothing to learn"
        if "weight" in message:
            if role != "assistant":
                yield f"{field}.weight", "only assistant messages have a weight"
            elif message["weight"] not in (0, 1) or isinstance(message["weight"], bool):
                yield f"{field}.weight", "is not 0 or 1"
        learned = learned or (role == "assistant" and message.get("weight", 1) != 0)
    if not learned:
        yield "messages", "no assistant message to learn from"
