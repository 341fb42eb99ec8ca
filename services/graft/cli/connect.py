"""Which gateway the command talks to: `GRAFT_ADDRESS`, or else the one that this home's settings start."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graft.client import Graft


def connect() -> "Graft":
    """A client. Raises InvalidArgument when the settings are at fault; the first call tells whether anyone answers."""
    from graft.client import Connection, Graft

    if os.environ.get("GRAFT_ADDRESS"):
        return Graft()
    from graft.settings import load

    settings = load()
    return Graft(Connection(settings.gateway_address, root_certificate=settings.gateway.tls_certificate))
