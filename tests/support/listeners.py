"""What processes listen on, for tests of what others can reach."""

import ipaddress
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Listener:
    """A socket that others can connect or send to."""

    process: str
    kind: str
    address: str
    port: int

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can."""
        address = ipaddress.ip_address(self.address)
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
            address = address.ipv4_mapped
        return address.is_loopback


def listeners(processes: Sequence[psutil.Process]) -> list[Listener]:
    """Of all these processes, without those that have ended since they were listed."""
    found: set[Listener] = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            found |= _listening(process)
    return sorted(found, key=lambda item: (item.process, item.address, item.port))


def _listening(process: psutil.Process) -> set[Listener]:
    title, found = " ".join(process.cmdline())[:70], set()
    for connection in process.net_connections(kind="inet"):
        udp = connection.type == socket.SOCK_DGRAM
        if connection.status == psutil.CONN_LISTEN or (udp and not connection.raddr):
            found.add(Listener(title, "udp" if udp else "tcp", connection.laddr.ip, connection.laddr.port))
    return found
