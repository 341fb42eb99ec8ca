"""Joins training workers into one process group, each by the address by which Ray knows its node.

Left alone, gloo looks up the machine's own name and tells the others what it finds. On Debian that is 127.0.1.1, where
nobody else reaches it; in a container without such an entry it is nothing. Imports torch: for the controller and the
workers only.
"""

import os
import socket
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

INTERFACE = "GLOO_SOCKET_IFNAME"


class _ByNodeAddress(_TorchBackend):  # type: ignore[misc]  # Ray's class has no types
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Called by Ray Train's controller when the workers' processes are there."""
        worker_group.execute(speak_by_node_address)
        super().on_start(worker_group, backend_config)


@dataclass
class NodeAddressConfig(TorchConfig):  # type: ignore[misc]  # as above
    """Ray Train's own, but for the interface."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """What sets the process group up."""
        return _ByNodeAddress


def speak_by_node_address() -> None:
    """Has gloo use the interface with the node's address, unless whoever started the node has named another."""
    if name := interface_of(ray.util.get_node_ip_address()):
        os.environ.setdefault(INTERFACE, name)


def interface_of(address: str) -> str | None:
    """The interface of this machine that has the address; None when none does, as behind a translated address."""
    families = (socket.AF_INET, socket.AF_INET6)
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.family in families and entry.address.partition("%")[0] == address for entry in entries):
            return name
    return None
