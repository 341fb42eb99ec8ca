"""Makes Serve's gRPC servers listen on the configured address instead of on every interface.

Ray Serve 2.60 has no such option: its proxy and its replicas bind `[::]`. Who may ask is decided behind the door: by
`graft.serving.guard` for the `Engine` service, by Ray's token for Serve's own between deployments. The hook runs in
each worker process of our Ray job before anything else (`worker_process_setup_hook`).
"""

import os
from typing import Any

from graft.settings import is_loopback

HOST_VARIABLE = "SERVE_GRPC_HOST"


def setup() -> None:
    """The hook. The address comes through the environment, which Ray hands down to actors that Serve makes."""
    host = os.environ.get(HOST_VARIABLE)
    if not host:
        return
    from ray.serve._private import default_impl, replica

    def bound(address: str) -> str:
        return f"{f'[{host}]' if ':' in host else host}:{address.rpartition(':')[2]}"

    def add_grpc_address(server: Any, address: str) -> None:
        server.add_insecure_port(bound(address))

    default_impl.add_grpc_address = add_grpc_address
    if is_loopback(host):
        # One machine: what replicas tell each other stays on it. Elsewhere each has an address of its own.
        add_port = replica.add_port_to_grpc_server
        replica.add_port_to_grpc_server = lambda server, address: add_port(server, bound(address))
