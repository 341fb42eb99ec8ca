"""Who may ask, on gRPC: anybody on loopback, beyond it only keys, each for its own project."""

from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from graft.api.v1.fine_tuning_service_pb2 import ListFineTuningJobsRequest, WatchFineTuningJobRequest
from graft.api.v1.fine_tuning_service_pb2_grpc import FineTuningServiceStub
from graft.api.v1.generation_service_pb2 import GenerateRequest
from graft.api.v1.generation_service_pb2_grpc import GenerationServiceStub
from graft.domain.errors import FailedPrecondition, PermissionDenied, Unauthenticated
from graft.gateway import server
from graft.gateway.auth import Authenticator, key_hash
from graft.settings import GatewaySettings, is_loopback
from tests.support.gateways import BASE, drained, gateway, refused, seeded_store


def bearing(token: str) -> dict[str, Any]:
    return {"metadata": (("authorization", f"Bearer {token}"),)}


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "127.9.9.9"])
def test_loopback_addresses_are_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "localhost.example.com", ""])
def test_no_other_address_is_loopback(host: str) -> None:
    assert not is_loopback(host)


async def test_an_address_beyond_loopback_is_refused_until_a_key_exists(tmp_path: Path) -> None:
    async with seeded_store(tmp_path) as store:
        authenticator = Authenticator(store, GatewaySettings(host="0.0.0.0"))
        with pytest.raises(FailedPrecondition, match="no API key exists") as caught:
            await authenticator.check_start()
        assert "GRAFT_GATEWAY_HOST" in caught.value.message
        await store.add_key(key_hash("secret"), "default", "test")
        await authenticator.check_start()


async def test_on_loopback_any_token_or_none_is_accepted_for_every_project(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        stub = FineTuningServiceStub(it.channel)
        for options in ({}, bearing("anything")):
            for parent in ("projects/default", "projects/other", ""):
                await stub.ListFineTuningJobs(ListFineTuningJobsRequest(parent=parent), **options)


async def test_beyond_loopback_only_a_known_key_opens_its_own_project(tmp_path: Path) -> None:
    async with gateway(tmp_path, GRAFT_GATEWAY_HOST="0.0.0.0") as it:
        await it.store.add_key(key_hash("secret"), "default", "test")
        stub = FineTuningServiceStub(it.channel)
        own = ListFineTuningJobsRequest(parent="projects/default")
        await stub.ListFineTuningJobs(own, **bearing("secret"))
        await stub.ListFineTuningJobs(ListFineTuningJobsRequest(), **bearing("secret"))
        await GenerationServiceStub(it.channel).Generate(GenerateRequest(model=BASE, prompt="hi"), **bearing("secret"))
        for options in ({}, bearing("wrong"), bearing(" "), {"metadata": (("authorization", "Basic c2VjcmV0"),)}):
            assert isinstance(await refused(stub.ListFineTuningJobs(own, **options)), Unauthenticated)
        other = ListFineTuningJobsRequest(parent="projects/other")
        error = await refused(stub.ListFineTuningJobs(other, **bearing("secret")))
        assert isinstance(error, PermissionDenied)
        watch = WatchFineTuningJobRequest(name="projects/default/fineTuningJobs/ft-none")
        assert isinstance(await refused(drained(stub.WatchFineTuningJob(watch))), Unauthenticated)


async def test_health_needs_no_key_and_reflection_lists_every_service(tmp_path: Path) -> None:
    async with gateway(tmp_path, GRAFT_GATEWAY_HOST="0.0.0.0") as it:
        await it.store.add_key(key_hash("secret"), "default", "test")
        health = health_pb2_grpc.HealthStub(it.channel)
        for service in ("", *server.SERVICES):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(it.channel)
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = await drained(reflection.ServerReflectionInfo(iter([question]), **bearing("secret")))
        listed = {service.name for service in answer.list_services_response.service}
        assert {*server.SERVICES, "grpc.health.v1.Health"} <= listed
        assert isinstance(await refused(drained(reflection.ServerReflectionInfo(iter([question])))), Unauthenticated)


async def test_a_second_gateway_cannot_share_the_port(tmp_path: Path) -> None:
    async with seeded_store(tmp_path) as store:
        first = grpc.aio.server()
        port = first.add_insecure_port("127.0.0.1:0")
        await first.start()
        settings = GatewaySettings(grpc_port=port)
        second, _ = server.grpc_server(None, Authenticator(store, settings), settings)  # type: ignore[arg-type]
        with pytest.raises(FailedPrecondition, match="GRAFT_GATEWAY_GRPC_PORT") as caught:
            server.add_grpc_port(second, settings)
        assert caught.value.reason == "PORT_TAKEN"
        await first.stop(None)


def test_half_a_tls_pair_or_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="GRAFT_GATEWAY_TLS_KEY"):
        server.check_tls(GatewaySettings(tls_certificate=tmp_path / "certificate.pem"))
    missing = GatewaySettings(tls_certificate=tmp_path / "certificate.pem", tls_key=tmp_path / "key.pem")
    with pytest.raises(FailedPrecondition, match="cannot be read"):
        server.check_tls(missing)
