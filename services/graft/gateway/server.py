"""The two servers of the gateway, made but not started: gRPC with health and reflection, and uvicorn for HTTP.

Owns options, TLS and the sockets. A port that cannot be had is one sentence that names its setting.
"""

import contextlib
import errno
import os
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import uvicorn
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from graft.api.v1 import (
    adapter_service_pb2,
    adapter_service_pb2_grpc,
    base_model_service_pb2,
    base_model_service_pb2_grpc,
    dataset_service_pb2,
    dataset_service_pb2_grpc,
    evaluation_service_pb2,
    evaluation_service_pb2_grpc,
    fine_tuning_service_pb2,
    fine_tuning_service_pb2_grpc,
    generation_service_pb2,
    generation_service_pb2_grpc,
    task_service_pb2,
    task_service_pb2_grpc,
)
from graft.domain.errors import FailedPrecondition
from graft.gateway.auth import Authenticator
from graft.gateway.core import Core
from graft.gateway.interceptor import Interceptor
from graft.gateway.services.adapters import AdapterService
from graft.gateway.services.base_models import BaseModelService
from graft.gateway.services.datasets import DatasetService
from graft.gateway.services.evaluations import EvaluationService
from graft.gateway.services.fine_tuning import FineTuningService
from graft.gateway.services.generation import GenerationService
from graft.gateway.services.tasks import TaskService
from graft.settings import GatewaySettings

SERVICES = tuple(
    file.DESCRIPTOR.services_by_name[name].full_name
    for file, name in (
        (adapter_service_pb2, "AdapterService"),
        (base_model_service_pb2, "BaseModelService"),
        (dataset_service_pb2, "DatasetService"),
        (evaluation_service_pb2, "EvaluationService"),
        (fine_tuning_service_pb2, "FineTuningService"),
        (generation_service_pb2, "GenerationService"),
        (task_service_pb2, "TaskService"),
    )
)


def grpc_server(
    core: Core, authenticator: Authenticator, settings: GatewaySettings
) -> tuple[grpc.aio.Server, health.aio.HealthServicer]:
    """The gRPC server with every public service, and the health servicer to tell of a drain. No port yet."""
    server = grpc.aio.server(
        interceptors=(Interceptor(authenticator),),
        options=(
            ("grpc.max_receive_message_length", settings.max_message_bytes),
            ("grpc.max_send_message_length", settings.max_message_bytes),
            # Without this, Linux lets two gateways share a port and answers come from either.
            ("grpc.so_reuseport", 0),
            # Watch streams idle for minutes: clients may ping every 10 s without being cut off.
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
        ),
    )
    adapter_service_pb2_grpc.add_AdapterServiceServicer_to_server(AdapterService(core), server)
    base_model_service_pb2_grpc.add_BaseModelServiceServicer_to_server(BaseModelService(core), server)
    dataset_service_pb2_grpc.add_DatasetServiceServicer_to_server(DatasetService(core), server)
    evaluation_service_pb2_grpc.add_EvaluationServiceServicer_to_server(EvaluationService(core), server)
    fine_tuning_service_pb2_grpc.add_FineTuningServiceServicer_to_server(FineTuningService(core), server)
    generation_service_pb2_grpc.add_GenerationServiceServicer_to_server(GenerationService(core), server)
    task_service_pb2_grpc.add_TaskServiceServicer_to_server(TaskService(core), server)
    healthy = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    return server, healthy


async def tell_serving(healthy: health.aio.HealthServicer) -> None:
    """Health is SERVING, for the whole and for each service."""
    for service in ("", *SERVICES):
        await healthy.set(service, health_pb2.HealthCheckResponse.SERVING)


def add_grpc_port(server: grpc.aio.Server, settings: GatewaySettings) -> int:
    """Binds gRPC's port and returns it. Raises FailedPrecondition naming the setting."""
    # gRPC tells a failure to bind as a bare RuntimeError: ask the kernel first, for the reason.
    bind(settings.host, settings.grpc_port, "GRAFT_GATEWAY_GRPC_PORT").close()
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"{host}:{settings.grpc_port}"
    try:
        if settings.tls_certificate and settings.tls_key:
            pair = (_read(settings.tls_key, "TLS_KEY"), _read(settings.tls_certificate, "TLS_CERTIFICATE"))
            return server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
        return server.add_insecure_port(address)
    except RuntimeError as error:
        raise FailedPrecondition(
            f"gRPC cannot listen on {address}: {error}. Check GRAFT_GATEWAY_GRPC_PORT and the TLS files.",
            reason="PORT_UNUSABLE",
        ) from error


def http_server(app: Any, settings: GatewaySettings) -> uvicorn.Server:
    """uvicorn over the ASGI app. Signals are the process's own, not uvicorn's."""
    return _Uvicorn(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=max(1, round(settings.shutdown_grace_seconds)),
            ssl_certfile=settings.tls_certificate,
            ssl_keyfile=settings.tls_key,
        )
    )


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(host: str, port: int, setting: str) -> socket.socket:
    """A bound socket. Raises FailedPrecondition with one sentence that names the setting."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise FailedPrecondition(
            f"GRAFT_GATEWAY_HOST is {host!r}, which is not an address here ({error.strerror}).", reason="BAD_HOST"
        ) from None
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind(address)
    except OSError as error:
        made.close()
        if error.errno == errno.EADDRINUSE:
            raise FailedPrecondition(
                f"Port {port} on {host} is taken by another process. Stop that process, or set {setting} to a free "
                "port.",
                reason="PORT_TAKEN",
                metadata={"setting": setting, "port": str(port)},
            ) from None
        raise FailedPrecondition(
            f"Port {port} on {host} cannot be used ({os.strerror(error.errno or 0)}). Check GRAFT_GATEWAY_HOST and "
            f"{setting}.",
            reason="PORT_UNUSABLE",
            metadata={"setting": setting, "port": str(port)},
        ) from None
    return made


def check_tls(settings: GatewaySettings) -> None:
    """Raises FailedPrecondition when one of the two TLS files is set without the other, or cannot be read."""
    if (settings.tls_certificate is None) != (settings.tls_key is None):
        raise FailedPrecondition(
            "TLS needs both files: set GRAFT_GATEWAY_TLS_CERTIFICATE and GRAFT_GATEWAY_TLS_KEY, or neither.",
            reason="TLS_INCOMPLETE",
        )
    if settings.tls_certificate and settings.tls_key:
        _read(settings.tls_certificate, "TLS_CERTIFICATE")
        _read(settings.tls_key, "TLS_KEY")
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.tls_certificate, settings.tls_key)
        except ssl.SSLError as error:
            raise FailedPrecondition(
                f"The TLS files do not make a pair ({error.reason or error}): GRAFT_GATEWAY_TLS_CERTIFICATE must be a "
                "PEM chain, and GRAFT_GATEWAY_TLS_KEY its unencrypted PEM key.",
                reason="TLS_MISMATCH",
            ) from None


def _read(path: Path, setting: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FailedPrecondition(
            f"GRAFT_GATEWAY_{setting} names {path}, which cannot be read ({error.strerror}).", reason="TLS_UNREADABLE"
        ) from None
