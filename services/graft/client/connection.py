"""Where the gateway is and who asks: address, key, project, TLS. `GRAFT_*` variables are the defaults."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from graft.domain.names import DEFAULT_PROJECT

DEFAULT_ADDRESS = "127.0.0.1:50051"
OPTIONS = (
    ("grpc.keepalive_time_ms", 30_000),  # a cut link is noticed within a minute, even in a silent watch
    ("grpc.keepalive_timeout_ms", 20_000),
)


def _environment(variable: str, fallback: str) -> str:
    return os.environ.get(variable) or fallback


@dataclass(frozen=True)
class Connection:
    """How to reach a gateway. `root_certificate` switches TLS on; `GRAFT_ADDRESS` may start with `https://` to do so
    with the system's certificates."""

    address: str = field(default_factory=lambda: _environment("GRAFT_ADDRESS", DEFAULT_ADDRESS))
    api_key: str = field(default_factory=lambda: _environment("GRAFT_API_KEY", ""), repr=False)
    project: str = field(default_factory=lambda: _environment("GRAFT_PROJECT", DEFAULT_PROJECT))
    root_certificate: Path | None = None

    @property
    def target(self) -> str:
        """`host:port`."""
        return self.address.removeprefix("https://").removeprefix("http://").rstrip("/")

    @property
    def parent(self) -> str:
        """Resource name of the project."""
        return f"projects/{self.project}"

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with every call."""
        return (("authorization", f"Bearer {self.api_key}"),) if self.api_key else ()

    @property
    def credentials(self) -> grpc.ChannelCredentials | None:
        """None for a connection without TLS."""
        if self.root_certificate is None and not self.address.startswith("https://"):
            return None
        roots = None if self.root_certificate is None else self.root_certificate.read_bytes()
        return grpc.ssl_channel_credentials(roots)
