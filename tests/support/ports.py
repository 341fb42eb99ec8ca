"""Ports for servers that tests start, each of which nobody else is given: neither by this process, nor by another one
that runs tests, nor by the kernel, nor by Ray.

What the kernel gives to who asks for no port in particular is free only for now: by the time that a process has
imported what it serves with, another may have it.
"""

import random
import socket

PORTS = range(24_001, 32_768)
"""Above what Ray gives to workers (10002 to 19999) and to the sessions of its clients (23000 to 24000), and below what
the kernel gives, unless a machine was told otherwise."""
_claims: list[socket.socket] = []
"""What says that a port is given: a name of this network namespace, which the kernel forgets when this process ends."""


def free_ports(count: int) -> list[int]:
    """TCP ports on loopback, this process's own as long as it runs. Nothing listens there until somebody does."""
    first = random.SystemRandom().randrange(len(PORTS))
    given: list[int] = []
    for port in (*PORTS[first:], *PORTS[:first]):
        if len(given) == count:
            return given
        if _claimed(port):
            given.append(port)
    raise OSError(f"Fewer than {count} ports from {PORTS[0]} to {PORTS[-1]} are free.")


def free_port() -> int:
    """One of them."""
    return free_ports(1)[0]


def _claimed(port: int) -> bool:
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        claim.bind(f"\0graft-tests-port-{port}")
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do
            probe.bind(("127.0.0.1", port))
    except OSError:
        claim.close()
        return False
    _claims.append(claim)
    return True
