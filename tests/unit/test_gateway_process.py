"""The gateway as a process: what it imports, that it starts, says so, drains, and refuses to start in one sentence."""

import asyncio
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from graft.api.v1.base_model_service_pb2 import ListBaseModelsRequest
from graft.api.v1.base_model_service_pb2_grpc import BaseModelServiceStub
from graft.api.v1.generation_service_pb2 import GenerateRequest
from graft.api.v1.generation_service_pb2_grpc import GenerationServiceStub
from graft.domain.errors import FailedPrecondition
from graft.gateway.auth import key_hash
from graft.gateway.main import add_initial_key, serve
from graft.internal.engine_client import EngineClient
from graft.settings import Settings, load
from graft.stack.doctor import check_gateway
from graft.stack.processes import described
from tests.support.command import graft
from tests.support.fake_engine import FakeEngine, fake_engine
from tests.support.gateways import eventually, seeded_store
from tests.support.ports import free_port

FORBIDDEN = ("ray", "torch", "vllm", "mlflow", "transformers", "peft", "datasets", "numpy", "pandas")


def environment(home: Path, **variables: object) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GRAFT_")}
    return kept | {"GRAFT_HOME": str(home)} | {name: str(value) for name, value in variables.items()}


def start(home: Path, **variables: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "graft.gateway.main"],
        env=environment(home, **variables),
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_gateway_imports_nothing_heavy() -> None:
    program = (
        "import json, sys, time; started = time.perf_counter(); import graft.gateway.main; "
        f"print(json.dumps([time.perf_counter() - started, [name for name in {FORBIDDEN!r} if name in sys.modules]]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    seconds, heavy = json.loads(done.stdout)
    print(f"import graft.gateway.main: {seconds:.2f} s")
    assert heavy == []


def test_it_says_when_it_is_ready_answers_on_both_ports_and_stops_on_sigterm(tmp_path: Path) -> None:
    ports = {"GRAFT_GATEWAY_GRPC_PORT": free_port(), "GRAFT_GATEWAY_HTTP_PORT": free_port()}
    process = start(tmp_path, **ports, GRAFT_GATEWAY_SHUTDOWN_GRACE_SECONDS=600)
    assert process.stderr is not None
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if '"gateway ready"' in line:
                break
        else:
            pytest.fail("".join(lines))
        ready = json.loads(lines[-1])
        assert ready["grpc"] == f"127.0.0.1:{ports['GRAFT_GATEWAY_GRPC_PORT']}"
        print(f"ready after {ready['seconds']} s")
        with grpc.insecure_channel(ready["grpc"]) as channel:
            stub = BaseModelServiceStub(channel)
            assert (
                list(stub.ListBaseModels(ListBaseModelsRequest(parent="projects/default"), timeout=20).base_models)
                == []
            )
        assert httpx.get(f"http://{ready['http']}/healthz", timeout=20).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0  # nothing was in flight: no need of the whole grace
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.parametrize("setting", ["GRAFT_GATEWAY_GRPC_PORT", "GRAFT_GATEWAY_HTTP_PORT"])
def test_a_taken_port_is_one_sentence_with_its_setting_and_exit_code_2(tmp_path: Path, setting: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = {"GRAFT_GATEWAY_GRPC_PORT": free_port(), "GRAFT_GATEWAY_HTTP_PORT": free_port()}
        process = start(tmp_path, **(ports | {setting: taken.getsockname()[1]}))
        _, told = process.communicate(timeout=30)
    assert process.returncode == 2
    assert setting in told
    assert "is taken" in told
    assert len(told.strip().splitlines()) == 1


def test_an_open_address_without_keys_is_refused_with_exit_code_2(tmp_path: Path) -> None:
    process = start(tmp_path, GRAFT_GATEWAY_HOST="0.0.0.0")
    _, told = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "no API key exists" in told


def test_an_unknown_setting_is_refused_with_a_hint(tmp_path: Path) -> None:
    process = start(tmp_path, GRAFT_GATEWAY_GRPC_PROT="1")
    _, told = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "Did you mean GRAFT_GATEWAY_GRPC_PORT?" in told


def test_a_token_of_the_engine_that_cannot_be_read_is_refused_with_its_setting(tmp_path: Path) -> None:
    process = start(tmp_path, GRAFT_SERVING_TOKEN_FILE=tmp_path / "nowhere")
    _, told = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "GRAFT_SERVING_TOKEN_FILE" in told
    assert len(told.strip().splitlines()) == 1


def self_signed(folder: Path) -> tuple[Path, Path]:
    """A certificate for localhost and its key, as PEM files."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (folder / "certificate.pem").write_bytes(certificate.public_bytes(pem))
    (folder / "key.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return folder / "certificate.pem", folder / "key.pem"


@asynccontextmanager
async def served(tmp_path: Path, **variables: object) -> AsyncIterator[tuple[Settings, FakeEngine, asyncio.Event]]:
    """The whole gateway in this process, over a fake engine; stopped at the end."""
    ports = {"GRAFT_GATEWAY_GRPC_PORT": free_port(), "GRAFT_GATEWAY_HTTP_PORT": free_port()}
    settings = load({name: str(value) for name, value in ({"GRAFT_HOME": tmp_path} | ports | variables).items()})
    stop = asyncio.Event()
    async with seeded_store(tmp_path) as store, fake_engine() as engine:
        client = EngineClient(engine.address)
        serving = asyncio.create_task(serve(settings, store, client, stop))
        try:
            yield settings, engine, stop
        finally:
            stop.set()
            await serving
            await client.close()


async def test_a_request_in_flight_is_answered_during_the_drain(tmp_path: Path) -> None:
    async with served(tmp_path) as (settings, engine, stop):
        engine.delay_seconds = 0.7
        async with grpc.aio.insecure_channel(f"127.0.0.1:{settings.gateway.grpc_port}") as channel:
            request = GenerateRequest(model="smollm2-135m", prompt="hi")
            call = GenerationServiceStub(channel).Generate(request, wait_for_ready=True, timeout=20)
            await eventually(lambda: len(engine.requests) == 1)
            stop.set()
            assert (await call).text == "[base] hi"


async def test_with_tls_files_both_ports_speak_tls(tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)
    files = {"GRAFT_GATEWAY_TLS_CERTIFICATE": certificate, "GRAFT_GATEWAY_TLS_KEY": key}
    async with served(tmp_path, **files) as (settings, _engine, _stop):
        trusted = grpc.ssl_channel_credentials(certificate.read_bytes())
        options = (("grpc.ssl_target_name_override", "localhost"),)
        address = f"127.0.0.1:{settings.gateway.grpc_port}"
        async with grpc.aio.secure_channel(address, trusted, options=options) as channel:
            request = ListBaseModelsRequest(parent="projects/default")
            listed = await BaseModelServiceStub(channel).ListBaseModels(request, wait_for_ready=True, timeout=20)
            assert [model.model for model in listed.base_models] == ["smollm2-135m"]
        async with httpx.AsyncClient(verify=ssl.create_default_context(cafile=certificate), timeout=20) as client:
            answer = await client.get(f"https://localhost:{settings.gateway.http_port}/healthz")
            assert answer.status_code == 200


async def test_with_tls_files_the_stack_and_the_commands_of_this_home_speak_tls_as_well(tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)
    files = {"GRAFT_GATEWAY_TLS_CERTIFICATE": certificate, "GRAFT_GATEWAY_TLS_KEY": key}
    async with served(tmp_path, GRAFT_GATEWAY_HOST="localhost", **files) as (settings, _engine, _stop):
        assert settings.gateway_url == f"https://localhost:{settings.gateway.http_port}"
        (probe,) = (process.probe for process in described(settings, {}) if process.name == "gateway")
        async with asyncio.timeout(20):
            while not await asyncio.to_thread(probe):  # noqa: ASYNC110 - it asks the socket
                await asyncio.sleep(0.05)
        ports = {"GRAFT_GATEWAY_GRPC_PORT": settings.gateway.grpc_port}
        listed = await graft("models", "--json", GRAFT_HOME=tmp_path, GRAFT_GATEWAY_HOST="localhost", **files, **ports)
        assert [model["model"] for model in listed.json] == ["smollm2-135m"]
        (check,) = await asyncio.to_thread(lambda: [*check_gateway(settings, "", running=True)])
        assert check.state == "ok"


def test_tls_files_that_are_no_pair_are_refused_at_start(tmp_path: Path) -> None:
    certificate, _ = self_signed(tmp_path)
    files = {"GRAFT_GATEWAY_TLS_CERTIFICATE": certificate, "GRAFT_GATEWAY_TLS_KEY": certificate}
    _, told = (process := start(tmp_path, **files)).communicate(timeout=30)
    assert process.returncode == 2
    assert "do not make a pair" in told


async def test_the_initial_key_is_added_once_and_opens_the_default_project(tmp_path: Path) -> None:
    file = tmp_path / "api-key"
    file.write_text("graft-" + "k" * 40 + "\n")
    async with seeded_store(tmp_path) as store:
        for _ in range(2):
            await add_initial_key(store, file)
        assert await store.find_key(key_hash("graft-" + "k" * 40)) == "default"
        assert await store.has_keys()


async def test_an_initial_key_that_can_be_guessed_or_not_be_read_is_refused(tmp_path: Path) -> None:
    async with seeded_store(tmp_path) as store:
        with pytest.raises(FailedPrecondition, match="GRAFT_GATEWAY_INITIAL_KEY_FILE"):
            await add_initial_key(store, tmp_path / "none")
        (tmp_path / "short").write_text("secret")
        with pytest.raises(FailedPrecondition, match="6 characters"):
            await add_initial_key(store, tmp_path / "short")
        assert not await store.has_keys()
