"""A packaged base model that is no model."""

import subprocess
from pathlib import Path

import pytest
import yaml

from graft.domain.errors import FailedPrecondition, ResourceExhausted
from graft.registry.base_models import ensure_base_model
from graft.settings import load

pytestmark = pytest.mark.integration


def test_a_file_that_cannot_be_converted_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    entry = {"package": "iniconfig", "file": "py.typed"}
    (tmp_path / "base_models.yaml").write_text(yaml.safe_dump({"broken": entry}))
    with pytest.raises(FailedPrecondition, match=r"^py\.typed cannot be converted .*make setup"):
        ensure_base_model(load({"GRAFT_HOME": str(tmp_path)}), "broken")
    assert [path.suffix for path in (tmp_path / "cache" / "base_models").iterdir()] == [".lock"]


def test_a_full_disk_is_told_with_what_is_needed(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        with pytest.raises(ResourceExhausted, match=r"disk of .* is full\. Free \d+ MB there, or set GRAFT_CACHE"):
            ensure_base_model(load({"GRAFT_HOME": str(disk)}), "smollm2-135m")
        assert [path.suffix for path in (disk / "cache" / "base_models").iterdir()] == [".lock"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
