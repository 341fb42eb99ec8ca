"""The connection of a process to the Ray cluster: as a driver on one of its nodes, or from outside by Ray Client.

Owns connecting and connecting again. Ray Client goes on by itself over half a minute without the network
(`RAY_CLIENT_RECONNECT_GRACE_PERIOD`); after that its session is lost for good and a new one has to be made. Runs are
detached and found by name, so that nothing is lost with a session. See docs/adr/0008.
"""

import logging
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import grpc
import ray

P = ParamSpec("P")
T = TypeVar("T")

NAMESPACE = "graft"
CLIENT_SCHEME = "ray://"
WHY_SECONDS = 5.0
"""A head answers in milliseconds."""


class RayLink:
    """A connection to the cluster at `address`: `host:port` of its head from one of its nodes, or `ray://host:port`.

    Calls block, and may come from many threads.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._lock = threading.Lock()
        self._broken = False
        self._sessions = 0

    @property
    def by_client(self) -> bool:
        """Whether this process is outside of the cluster."""
        return self._address.startswith(CLIENT_SCHEME)

    def connect(self) -> None:
        """Makes a session. Raises ConnectionError when nothing answers, RuntimeError for other versions of Ray or
        Python than the cluster's."""
        if self.by_client:
            try:
                # What else `ray.init` takes would be passed on to the driver that the head starts for this session.
                ray.init(address=self._address, namespace=NAMESPACE, log_to_driver=False)
            except ConnectionError as error:
                said = str(error).strip().splitlines()[-1:]  # above it may be the head's trace
                raise ConnectionError(f"{self._why_not()} ({''.join(said)})") from error
            return
        ray.init(
            address=self._address,
            namespace=NAMESPACE,
            log_to_driver=False,
            logging_level=logging.WARNING,
            configure_logging=False,
        )

    def ask(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Calls `function`, in a new session when the last one was lost. Raises ConnectionError while there is none."""
        if self.by_client:
            self._renew()
        session = self._sessions
        try:
            return function(*args, **kwargs)
        except ConnectionError:
            self._lose(session)
            raise
        except grpc.RpcError as error:
            self._lose(session)
            raise ConnectionError(f"Ray Client: {error}") from error

    def _lose(self, session: int) -> None:
        with self._lock:
            # A call may tell of the last session after another has made a new one, which is whole.
            self._broken = self._broken or session == self._sessions

    def _why_not(self) -> str:
        """What Ray Client keeps to itself: it says of a wrong token and of a wrong port that time has run out."""
        from ray._private.grpc_utils import init_grpc_channel
        from ray.core.generated import ray_client_pb2, ray_client_pb2_grpc

        with init_grpc_channel(self._address.removeprefix(CLIENT_SCHEME)) as channel:
            ask = ray_client_pb2_grpc.RayletDriverStub(channel).ClusterInfo
            try:
                ask(ray_client_pb2.ClusterInfoRequest(type=ray_client_pb2.ClusterInfoType.PING), timeout=WHY_SECONDS)
            except grpc.RpcError as error:
                code, details = error.code(), (error.details() or "").splitlines()
                if code is grpc.StatusCode.UNAUTHENTICATED:
                    return "It refuses this process's token"
                return f"{code.name}: {details[0] if details else 'no details'}"
        return "It answers, and starts no session"

    def _renew(self) -> None:
        with self._lock:
            if not self._broken and ray.is_initialized():
                return
            try:
                ray.shutdown()
                self.connect()
            except Exception as error:  # whatever it is, the cluster cannot be reached now: it may be upgraded
                raise ConnectionError(f"No session with {self._address}: {error}") from error
            self._broken = False
            self._sessions += 1


class Connected:
    """In the place of a link where the process is connected by other means: in tests, and in actors."""

    @staticmethod
    def ask(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Calls `function`."""
        return function(*args, **kwargs)
