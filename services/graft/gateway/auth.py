"""Who may ask: API keys, stored as SHA-256, on both protocols as `Authorization: Bearer <key>`.

On loopback every token, or none, is accepted and the project is the one that the request names; pages of the web, which
a browser on this machine shows, are kept out. Any other address is refused at start until the store has keys; there a
key opens its own project only.
"""

import hashlib
from contextvars import ContextVar
from dataclasses import dataclass
from urllib.parse import urlsplit

from graft.domain.errors import FailedPrecondition, PermissionDenied, Unauthenticated
from graft.domain.names import DEFAULT_PROJECT
from graft.settings import GatewaySettings, is_loopback
from graft.store.protocol import Store


@dataclass(frozen=True)
class Principal:
    """Who asks. `project` is None for one who may use every project."""

    project: str | None = None

    def default_project(self) -> str:
        """The project of a request that names none."""
        return self.project or DEFAULT_PROJECT

    def check(self, project: str) -> str:
        """Returns `project`; raises PermissionDenied when it is not this principal's."""
        if self.project is not None and project != self.project:
            raise PermissionDenied(
                f"This API key is for project {self.project!r}, not for {project!r}.",
                reason="WRONG_PROJECT",
                metadata={"project": project},
            )
        return project


_principal: ContextVar[Principal] = ContextVar("graft_principal")


def begin(principal: Principal) -> None:
    """Sets who the current task answers."""
    _principal.set(principal)


def current() -> Principal:
    """Who the current task answers. Raises LookupError outside of a request."""
    return _principal.get()


def key_hash(secret: str) -> str:
    """What is stored of an API key. Keys are long and random, so that a plain digest cannot be guessed back."""
    return hashlib.sha256(secret.encode()).hexdigest()


class Authenticator:
    """Turns an `Authorization` header into a Principal."""

    def __init__(self, store: Store, settings: GatewaySettings) -> None:
        self._store = store
        self._host = settings.host
        self._open = is_loopback(settings.host)

    async def check_start(self) -> None:
        """Raises FailedPrecondition when the gateway would listen beyond loopback without a single key."""
        if not self._open and not await self._store.has_keys():
            raise FailedPrecondition(
                f"GRAFT_GATEWAY_HOST is {self._host}, which other machines can reach, but no API key exists. Add one "
                "to the store, or listen on 127.0.0.1.",
                reason="NO_API_KEYS",
            )

    def check_local(self, host: str | None, origin: str | None) -> None:
        """Raises PermissionDenied for a request that a page of another site makes a browser on this machine send, where
        no key would keep it out: by its `Origin`, or by a `Host` that names this machine otherwise (DNS rebinding)."""
        foreign = next((name for name in (origin, host and f"//{host}") if name and not _is_local(name)), None)
        if self._open and foreign is not None:
            raise PermissionDenied(
                "Without API keys only this machine is answered, under names such as localhost, and not "
                f"{foreign.removeprefix('//')!r}. Set GRAFT_GATEWAY_HOST to another address, where keys are asked for.",
                reason="NOT_LOCAL",
            )

    async def authenticate(self, authorization: str | None) -> Principal:
        """The Principal of a header's value. Raises Unauthenticated for a missing, malformed or unknown key."""
        if self._open:
            return Principal()
        scheme, _, secret = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not secret.strip():
            raise Unauthenticated("No API key. Send it as 'Authorization: Bearer <key>'.", reason="API_KEY_MISSING")
        project = await self._store.find_key(key_hash(secret.strip()))
        if project is None:
            raise Unauthenticated("The API key is not known here.", reason="API_KEY_UNKNOWN")
        return Principal(project)


def _is_local(origin: str) -> bool:
    """Whether the host of an origin is this machine by name; `null`, as of a page in a sandbox, is not."""
    try:
        host = urlsplit(origin).hostname or ""
    except ValueError:  # an address in brackets that is none
        return False
    return is_loopback(host) or host.endswith(".localhost")  # RFC 6761
