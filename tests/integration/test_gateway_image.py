"""The gateway's image, built for real from locally made bases: its size, what is in it, and its process at work with a
read-only root, without privileges."""

import json
import time
from collections.abc import Iterator

import pytest

from tests.support import images
from tests.support.images import Image, Running

# Two bases from Debian's archive and fifty packages: two minutes alone on two cores.
pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(bool(images.missing()), reason=images.missing() or "can be built"),
]

LIMIT_BYTES = 300_000_000
HEAVY = ("ray", "torch", "vllm", "mlflow", "transformers", "peft", "datasets", "numpy", "pandas")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    folder = tmp_path_factory.mktemp("images")
    env = images.environment(folder)
    try:
        images.run(str(images.ROOT / "deploy" / "images" / "local-bases"), env=env)
        yield images.build("gateway", folder, env)
    finally:
        images.run("buildah", "umount", "--all", env=env)
        images.run("buildah", "rm", "--all", env=env)
        images.run("buildah", "rmi", "--all", "--force", env=env)  # a gigabyte, which pytest would keep three times


@pytest.fixture(scope="module")
def gateway(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    log = tmp_path_factory.mktemp("gateway") / "log"
    with image.running(log) as running:
        yield running


def test_it_is_smaller_than_300_mb(image: Image) -> None:
    print(f"{image.name}: {image.size_bytes / 1e6:.0f} MB")
    assert image.size_bytes < LIMIT_BYTES


def test_its_own_health_check_passes(gateway: Running) -> None:
    kind, *check = gateway.image.config["Healthcheck"]["Test"]
    assert kind == "CMD"
    deadline = time.monotonic() + 60
    while (asked := gateway.execute(check)).returncode != 0:
        assert gateway.process.poll() is None, gateway.log.read_text()
        assert time.monotonic() < deadline, asked.stderr + gateway.log.read_text()
        time.sleep(0.5)


def test_it_runs_as_nobody_in_particular_and_cannot_write_to_its_root(gateway: Running) -> None:
    assert gateway.inside.uids().real == gateway.inside.gids().real == 65532
    tried = gateway.execute(["python3", "-c", "open('/opt/graft/x', 'w')"])
    assert "Read-only file system" in tried.stderr


def test_it_has_no_shell_and_nothing_heavy(gateway: Running) -> None:
    root = gateway.image.root
    assert not [shell for shell in ("bin/sh", "usr/bin/sh", "bin/bash") if (root / shell).exists()]
    assert not [package for package in HEAVY if (root / "opt" / "graft" / package).exists()]


def test_it_reads_parquet_with_what_was_left_of_arrow(gateway: Running) -> None:
    program = """
import pyarrow, pyarrow.parquet
from pathlib import Path
from graft.data.formats import validate_file
file = Path("/tmp/rows.parquet")
pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "completion": ["c", "d"]}), file)
report = validate_file(file)
print(report.row_count)
"""
    told = gateway.execute(["python3", "-c", program])
    assert told.stdout.strip() == "2", told.stderr


def test_it_migrates_the_store_and_makes_keys(gateway: Running) -> None:
    told = gateway.execute(["python3", "-m", "graft.store.main", "add-key", "--label", "test"])
    assert told.stdout.startswith("graft-"), told.stderr


def test_it_says_what_is_missing_and_drains_on_sigterm(gateway: Running) -> None:
    program = (
        "import urllib.request as r, urllib.error as e\n"
        "try: r.urlopen('http://127.0.0.1:8080/readyz')\n"
        "except e.HTTPError as found: print(found.read().decode())"
    )
    asked = json.loads(gateway.execute(["python3", "-c", program]).stdout)
    assert asked["store"] == "ready"
    assert not asked["ready"]
    inside = gateway.inside
    inside.terminate()
    assert gateway.process.wait(30) == 0, gateway.log.read_text()
    assert "gateway stops" in gateway.log.read_text()
