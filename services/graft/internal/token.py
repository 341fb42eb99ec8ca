"""The token that the internal `Engine` service asks for: where it lies, how it is sent, whether it is the right one.

Owns the file and the metadata; knows neither Ray Serve nor what is asked. It is a file and not a variable, since
variables are inherited by whatever a process starts, and since a path may be logged, pickled and shown.
"""

import hmac
import os
from collections.abc import Iterable
from pathlib import Path

from graft.domain.errors import FailedPrecondition, Unauthenticated
from graft.settings import Settings, is_loopback

VARIABLE = "GRAFT_SERVING_TOKEN_FILE"
SHORTEST_TOKEN = 32
"""Characters. Nothing slows down who tries one after the other."""
_KEY = "authorization"
_SCHEME = "Bearer "


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
    """The token of these settings' inference service, empty where it asks for none. Raises as `read_token`."""
    return read_token(token_file(settings))


def host_token() -> str:
    """The same on a node of Ray, which has no settings file: by the variable alone. Raises as `read_token`."""
    file = os.environ.get(VARIABLE)
    return read_token(Path(file) if file else None)


def read_token(file: Path | None) -> str:
    """The token in `file`, empty for None. Raises FailedPrecondition when it cannot be read or is none."""
    if file is None:
        return ""
    try:
        token = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise FailedPrecondition(
            f"serving.token_file ({VARIABLE}) names {file}, which cannot be read ({why}).",
            reason="ENGINE_TOKEN_UNREADABLE",
        ) from None
    if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise FailedPrecondition(
            f"{file} ({VARIABLE}) holds no token: it has to be one line of {SHORTEST_TOKEN} ASCII characters or more, "
            "without spaces.",
            reason="ENGINE_TOKEN_INVALID",
        )
    return token


def metadata(token: str) -> tuple[tuple[str, str], ...]:
    """What a call brings with it; nothing without a token."""
    return ((_KEY, f"{_SCHEME}{token}"),) if token else ()


def check(token: str, brought: Iterable[tuple[str, str | bytes]]) -> None:
    """Raises Unauthenticated unless the metadata that a call has `brought` holds `token`."""
    sent = next((value for key, value in brought if key == _KEY), None)
    if sent is None:
        raise Unauthenticated(
            f"The inference service asks for a token: set {VARIABLE} to the file that holds it.",
            reason="ENGINE_TOKEN_MISSING",
        )
    # In bytes: text is compared in constant time only when it is ASCII.
    said = sent.encode() if isinstance(sent, str) else sent
    if not hmac.compare_digest(said, f"{_SCHEME}{token}".encode()):
        raise Unauthenticated(
            f"The inference service takes another token than this one: {VARIABLE} has to name the same on both sides.",
            reason="ENGINE_TOKEN_WRONG",
        )
