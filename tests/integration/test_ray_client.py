"""Runs on a cluster that is reached by Ray Client, with their files in a bucket, over a link that is cut."""

import asyncio
import json
import os
import pickle
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import s3fs

from graft.storage import Storage, share_base_model
from graft.training.spec import RunSpec
from tests.support.orchestrator_process import listening, process
from tests.support.postgres import free_port
from tests.support.run_specs import tiny_run, validated_on
from tests.support.s3_server import s3_server
from tests.support.tiny_llama import make_tiny_llama

pytestmark = [pytest.mark.integration, pytest.mark.timeout(800)]

GRACE_SECONDS = 5
"""Ray Client's own patience, which is 30 s: the cut of 15 s must be longer."""


@pytest.fixture
def root() -> Iterator[Path]:
    # Not tmp_path: Ray's sockets lie below it, and a socket's path has 107 characters at most.
    folder = Path(tempfile.mkdtemp(prefix="graft-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def _spec(root: Path, storage: Storage) -> RunSpec:
    base = make_tiny_llama(root / "base")
    share_base_model(storage, str(base), "sha256:b")
    shutil.rmtree(base)
    rows = [{"prompt": f"{n} is ", "completion": "even" if n % 2 == 0 else "odd"} for n in range(40)]
    uri = storage.uri("datasets", "default", "ds-1.jsonl")
    storage.write(uri, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return tiny_run(base, uri, "/nowhere/on/this/host", job_id="ft-none", storage=storage, **validated_on(uri))


async def test_a_sweep_leaves_its_best_adapter_in_the_bucket_and_a_cut_link_ends_no_run(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_server() as s3:
        for name, value in s3.variables.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        storage = Storage("s3://graft/main", s3.endpoint_url)
        (root / "spec").write_bytes(pickle.dumps(_spec(root, storage)))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GRAFT_")}
        environment |= {"GRAFT_HOME": str(root / "node"), "RAY_USAGE_STATS_ENABLED": "0"}
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        ray_port, client_port = free_port(), free_port()
        head = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"),
            *("--node-ip-address=127.0.0.1", f"--port={ray_port}", f"--ray-client-server-port={client_port}"),
            *("--include-dashboard=false", f"--temp-dir={root / 'ray'}"),
            *("--object-store-memory=100000000", "--disable-usage-stats"),
        ]
        driver = [sys.executable, "-m", "tests.support.ray_client_driver", str(client_port), str(root / "spec")]
        with process(head, environment, root / "head.log"):
            await listening(client_port, root / "head.log", 180)
            environment |= {
                "RAY_CLIENT_RECONNECT_GRACE_PERIOD": str(GRACE_SECONDS),
                "GRAFT_HOME": str(root / "outside"),
            }
            ran = await asyncio.to_thread(
                subprocess.run, driver, env=environment, capture_output=True, text=True, timeout=560
            )
        assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
        found: dict[str, Any] = json.loads(ran.stdout.strip().splitlines()[-1])
        adapter = storage.fetch_folder(storage.uri("runs", "ft-sweep", "1", "adapter"), root / "adapter")
        left = storage.names(storage.uri("runs", "ft-sweep", "1", "trials", "2"))
    assert found["cpus"] == 2.0
    assert (found["sweep"]["kind"], found["sweep"]["best_trial"]) == ("finished", 1), found["sweep"]
    assert sorted(path.name for path in adapter.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "graft.json",
    ]
    assert any(name.endswith("adapter_model.safetensors") for name in left)
    cuts = found["cuts"]
    assert cuts["before"] >= 2
    assert cuts["after_short_cut"] is True
    assert cuts["errors"], cuts  # it was cut for longer than Ray Client waits
    assert cuts["after_long_cut"] is True
    assert cuts["next_sequence"] == cuts["seen"] + 1
    assert cuts["exists"] is False
    assert not (root / "outside" / "cache" / "runs").exists()
