"""Makes Serve's gRPC proxy listen on the configured address instead of on every interface.

Ray Serve 2.60 has no such option: its proxy binds `[::]`, and the internal `Engine` service has no authentication.
The hook runs in each worker process of our Ray job before anything else (`worker_process_setup_hook`).
"""

import os
from typing import Any

HOST_VARIABLE = "SERVE_GRPC_HOST"


def setup() -> None:
    """The hook. The address comes through the environment, which Ray hands down to actors that Serve makes."""
    host = os.environ.get(HOST_VARIABLE)
    if not host:
        return
    from ray.serve._private import default_impl

    def add_grpc_address(server: Any, address: str) -> None:
        bound = f"[{host}]" if ":" in host else host
        server.add_insecure_port(f"{bound}:{address.rpartition(':')[2]}")

    default_impl.add_grpc_address = add_grpc_address
