"""`serve deploy deploy/serve.yaml` on a Ray cluster that is there already, and the names of what Ray measures then.

One cluster for the module, and one application on it.
"""

import asyncio
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest
import yaml

from graft.internal.engine_client import EngineClient
from graft.internal.token import engine_token
from graft.serving.declared import Arguments, application
from graft.settings import ServingSettings, Settings, StorageSettings, load
from graft.stack.processes import ray_environment
from tests.support.dashboards import metric_names
from tests.support.ports import free_port, free_ports
from tests.support.serving_stack import ray_cluster, request
from tests.support.tiny_llama import make_tiny_llama
from tests.support.token_contract import refuses_all_without

pytestmark = [pytest.mark.integration, pytest.mark.ray, pytest.mark.timeout(500)]

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Cluster:
    settings: Settings
    environment: dict[str, str]
    folder: Path

    def client(self) -> EngineClient:
        return EngineClient(self.settings.engine_address, "tiny", token=engine_token(self.settings))

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.settings.ray.dashboard_port}"

    def serve(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "ray.serve.scripts", *arguments, "--address", self.dashboard],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def _until_the_dashboard_answers(address: str) -> None:
    """Ray's head is ready before its dashboard is, by which Serve is told what to deploy."""
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(f"{address}/api/ray/version", timeout=5):
                return
        except urllib.error.HTTPError:
            return  # it asks for the token, which is an answer
        except OSError:
            assert time.monotonic() < deadline, f"no dashboard answers at {address}"
            time.sleep(0.2)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    ray_port, dashboard_port, grpc_port = free_ports(3)
    variables = {
        "GRAFT_HOME": str(folder / "home"),
        "GRAFT_RAY_PORT": str(ray_port),
        "GRAFT_RAY_DASHBOARD_PORT": str(dashboard_port),
        "GRAFT_SERVING_GRPC_PORT": str(grpc_port),
        "GRAFT_SERVING_BASE_MODEL": "tiny",
        "GRAFT_SERVING_TOKEN_FILE": str(folder / "token"),
        "GRAFT_RAY_NUM_CPUS": "2",
        "GRAFT_RAY_OBJECT_STORE_MIB": "80",
    }
    (folder / "token").write_text("ab" * 32)
    settings = load(variables)
    environment = {**os.environ, "GRAFT_TEST_STACK": str(folder), **ray_environment(settings)}
    with ray_cluster(settings, environment, folder, dashboard=True):
        made = Cluster(settings, environment, folder)
        _until_the_dashboard_answers(made.dashboard)
        yield made


def declared(cluster: Cluster) -> dict[str, Any]:
    """The file as it is shipped, with this machine's folders, ports and a tiny base model."""
    document: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text())
    base = make_tiny_llama(cluster.folder / "base")
    home = cluster.settings.home.path
    (home / "base_models.yaml").write_text(yaml.safe_dump({"tiny": {"folder": str(base), "license": "Apache-2.0"}}))
    document["grpc_options"]["port"] = cluster.settings.serving.grpc_port
    document["http_options"]["port"] = free_port()
    document["applications"][0]["args"].update(
        home=str(home),
        tracking_uri="http://127.0.0.1:9",
        serving={
            "base_model": "tiny",
            "max_lora_rank": 16,
            "context_tokens": 256,
            "dtype": "float32",
            "token_file": str(cluster.settings.serving.token_file),
        },
    )
    return document


def until_it_runs(cluster: Cluster) -> None:
    """KubeRay moves its Service to a new cluster as soon as Serve says this of its applications."""
    deadline = time.monotonic() + 240
    while True:
        application = yaml.safe_load(cluster.serve("status"))["applications"].get("graft-engine", {})
        if application.get("status") == "RUNNING":
            return
        assert time.monotonic() < deadline, application
        time.sleep(0.5)


@pytest.fixture(scope="module")
def deployed(cluster: Cluster) -> Cluster:
    """With the application of the shipped file, which runs."""
    file = cluster.folder / "serve.yaml"
    file.write_text(yaml.safe_dump(declared(cluster)))
    cluster.serve("deploy", str(file))
    until_it_runs(cluster)
    return cluster


def test_the_shipped_file_deploys_an_application_that_answers_as_soon_as_it_runs(deployed: Cluster) -> None:
    async def ask() -> None:
        client = deployed.client()
        try:
            response = await client.generate(request(None, "hi"), timeout_seconds=60)
            assert response.http_status == 200
            assert json.loads(response.body)["model"] == "tiny"
        finally:
            await client.close()

    asyncio.run(ask())


def test_the_declared_application_asks_for_the_token_of_the_file_that_is_named(deployed: Cluster) -> None:
    asyncio.run(refuses_all_without(deployed.settings.engine_address, engine_token(deployed.settings)))
    assert engine_token(deployed.settings) not in deployed.serve("config")


def test_an_argument_that_does_not_exist_is_refused_by_name(deployed: Cluster) -> None:
    document = yaml.safe_load((deployed.folder / "serve.yaml").read_text())
    document["applications"][0]["args"]["serving"]["num_replica"] = 2
    file = deployed.folder / "wrong.yaml"
    file.write_text(yaml.safe_dump(document))
    deployed.serve("deploy", str(file))
    deadline = time.monotonic() + 120
    while True:
        application = yaml.safe_load(deployed.serve("status"))["applications"]["graft-engine"]
        if application["status"] == "DEPLOY_FAILED":
            break
        assert time.monotonic() < deadline, application
        time.sleep(1)
    assert "num_replica" in application["message"]
    # What was there before goes on answering.
    assert asyncio.run(_answers(deployed)) == 200


async def _answers(cluster: Cluster) -> int:
    client = cluster.client()
    try:
        return (await client.generate(request(None, "hi"), timeout_seconds=60)).http_status
    finally:
        await client.close()


def test_a_bucket_gets_the_base_model_for_engines_on_nodes_that_have_none(tmp_path: Path) -> None:
    base = make_tiny_llama(tmp_path / "base")
    (tmp_path / "base_models.yaml").write_text(yaml.safe_dump({"tiny": {"folder": str(base), "license": "MIT"}}))
    bucket = tmp_path / "bucket"
    application(
        Arguments(
            home=tmp_path,
            tracking_uri="http://nowhere",
            storage=StorageSettings(url=f"file://{bucket}"),
            serving=ServingSettings(base_model="tiny"),
        )
    )
    (shared,) = (bucket / "base_models").iterdir()
    assert (shared / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_ray_exports_each_metric_that_rules_and_dashboards_ask_of_it(deployed: Cluster) -> None:
    assert asyncio.run(_answers(deployed)) == 200  # some are told from the first request on
    wanted = {name for name in metric_names() if name.startswith("ray_")}
    assert wanted
    deadline = time.monotonic() + 120
    while True:
        try:
            missing = wanted - exported(deployed)
        except (OSError, HTTPException):  # Ray names endpoints that do not listen yet
            missing = wanted
        if not missing:
            return
        assert time.monotonic() < deadline, f"never exported: {sorted(missing)}"
        time.sleep(2)


def exported(cluster: Cluster) -> set[str]:
    """Names of every sample on every node's endpoint, which Ray's own discovery names, as in deploy/prometheus."""
    token = Path(cluster.environment["RAY_AUTH_TOKEN_PATH"]).read_text().strip()
    discovery = urllib.request.Request(
        f"{cluster.dashboard}/api/prometheus/sd", headers={"Authorization": f"Bearer {token}"}
    )
    with urllib.request.urlopen(discovery, timeout=10) as answer:
        groups = json.load(answer)
    names = set()
    for target in (target for group in groups for target in group["targets"]):
        with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as page:
            lines = page.read().decode().splitlines()
        names |= {line.split("{")[0].split(" ")[0] for line in lines if line and not line.startswith("#")}
    return names
