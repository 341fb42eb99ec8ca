"""checkov finds nothing in the Dockerfiles but what is excused in them."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OWN = ROOT / "build" / "checkov" / "bin" / "checkov"
CHECKOV = str(OWN) if OWN.exists() else shutil.which("checkov")

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(CHECKOV is None, reason="checkov is not installed: deploy/setup/checkov"),
]


def failed(folder: Path) -> list[str]:
    command = [CHECKOV or "", "--skip-download", "--framework=dockerfile", "--output=json", f"--directory={folder}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    report = json.loads(done.stdout)
    assert report["summary"]["parsing_errors"] == 0
    return [f"{check['check_id']} {check['file_path']}" for check in report["results"]["failed_checks"]]


def test_checkov_accepts_every_dockerfile() -> None:
    assert failed(ROOT / "deploy" / "images") == []


def test_checkov_refuses_what_it_should(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM debian:latest\n")
    assert {"CKV_DOCKER_3 /Dockerfile", "CKV_DOCKER_7 /Dockerfile"} <= set(failed(tmp_path))
