"""The token that the internal `Engine` service asks for: where it lies, how it is sent, whether it is the right one.

Owns the file and the metadata; knows neither Ray Serve nor what is asked. It is a file and not a variable, since
variables are inherited by whatever a process starts, and since a path may be logged, pickled and shown. It may hold
several, one a line: the service takes each of them, and who asks sends the first, so that one can follow another
without a call being refused.
"""

import hmac
import os
from collections.abc import Iterable
from pathlib import Path

import structlog

from graft.domain.errors import FailedPrecondition, Unauthenticated
from graft.settings import Settings, is_loopback

VARIABLE = "GRAFT_SERVING_TOKEN_FILE"
SHORTEST_TOKEN = 32
"""Characters. Nothing slows down who tries one after the other."""
_KEY = "authorization"
_SCHEME = "Bearer "

_log = structlog.get_logger("graft.internal.token")


def own_token_file(settings: Settings) -> Path:
    """Where the stack of a home keeps the token that it makes for itself."""
    return settings.home.path / "run" / "engine-token"


def makes_own_token(settings: Settings) -> bool:
    """Whether nothing but this home's processes needs the token: they share a machine, and none was named."""
    elsewhere = settings.serving.address or settings.orchestrator.ray_address or not is_loopback(settings.ray.host)
    return settings.serving.token_file is None and not elsewhere


def token_file(settings: Settings) -> Path | None:
    """The file of the token by which these settings' inference service is asked; None where it asks for none."""
    if not makes_own_token(settings):
        return settings.serving.token_file
    own = own_token_file(settings)
    return own if own.is_file() else None


def engine_token(settings: Settings) -> str:
    """What these settings' inference service is asked with, empty where it asks for none. Raises as `read_tokens`."""
    return first(read_tokens(token_file(settings)))


def host_token() -> str:
    """The same on a node of Ray, which has no settings file: by the variable alone. Raises as `read_tokens`."""
    file = os.environ.get(VARIABLE)
    return first(read_tokens(Path(file) if file else None))


def first(tokens: tuple[str, ...]) -> str:
    """The one that is sent; empty without any."""
    return tokens[0] if tokens else ""


def read_tokens(file: Path | None) -> tuple[str, ...]:
    """The tokens in `file`, none for None. Raises FailedPrecondition when it cannot be read or holds none."""
    if file is None:
        return ()
    try:
        tokens = tuple(line.strip() for line in file.read_text().splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise FailedPrecondition(
            f"serving.token_file ({VARIABLE}) names {file}, which cannot be read ({why}).",
            reason="ENGINE_TOKEN_UNREADABLE",
        ) from None
    if not tokens or not all(_is_token(line) for line in tokens):
        raise FailedPrecondition(
            f"{file} ({VARIABLE}) holds no token, or something else: each line has to be {SHORTEST_TOKEN} ASCII "
            "characters or more, without spaces.",
            reason="ENGINE_TOKEN_INVALID",
        )
    return tokens


def _is_token(line: str) -> bool:
    return len(line) >= SHORTEST_TOKEN and line.isascii() and line.isprintable() and " " not in line


class TakenTokens:
    """What a service takes: the tokens of a file, read anew when it changes, so that no engine restarts for another."""

    def __init__(self, file: Path | None) -> None:
        """Raises as `read_tokens`."""
        self._file = file
        self._stamp = _stamp(file)
        self._tokens = read_tokens(file)

    def now(self) -> tuple[str, ...]:
        """None: anybody may ask. A file that is gone or holds something else changes nothing, and is told once."""
        stamp = _stamp(self._file)  # some microseconds a call
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._tokens = read_tokens(self._file)
            except FailedPrecondition as error:
                _log.error("the tokens of before are taken on", error=error.message)
        return self._tokens


def _stamp(file: Path | None) -> tuple[int, int, int] | None:
    """Of a file's content, as far as that is told without reading it; None without a file."""
    try:
        found = file.stat() if file else None
    except OSError:
        return None
    return (found.st_ino, found.st_mtime_ns, found.st_size) if found else None


def metadata(token: str) -> tuple[tuple[str, str], ...]:
    """What a call brings with it; nothing without a token."""
    return ((_KEY, f"{_SCHEME}{token}"),) if token else ()


def check(tokens: Iterable[str], brought: Iterable[tuple[str, str | bytes]]) -> None:
    """Raises Unauthenticated unless the metadata that a call has `brought` holds one of `tokens`."""
    sent = next((value for key, value in brought if key == _KEY), None)
    if sent is None:
        raise Unauthenticated(
            f"The inference service asks for a token: set {VARIABLE} to the file that holds it.",
            reason="ENGINE_TOKEN_MISSING",
        )
    # In bytes: text is compared in constant time only when it is ASCII.
    said = sent.encode() if isinstance(sent, str) else sent
    if not any(hmac.compare_digest(said, f"{_SCHEME}{token}".encode()) for token in tokens):
        raise Unauthenticated(
            f"The inference service takes another token than this one: {VARIABLE} has to name the same on both sides.",
            reason="ENGINE_TOKEN_WRONG",
        )
