"""Pages of the documentation, run as they stand: every block in order, by a shell, against the running stack."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny_jobs import BASE
from tests.support.whole_stack import WholeStack
from tests.unit.test_docs import BLOCK, ROOT

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

PAGE_SECONDS = 400.0
"""Tells a page from a hang: two jobs of ten steps, each with the start of its worker."""


@pytest.fixture(scope="module")
def bin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the PATH with `graft` in it, as an activated environment has it."""
    folder = tmp_path_factory.mktemp("bin")
    command = folder / "graft"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m graft.cli.main "$@"\n')
    command.chmod(0o755)
    return folder


@pytest.mark.parametrize("task", ["chat", "text-classification", "question-answering", "summarisation"])
def test_a_page_runs_as_it_stands(task: str, stack: WholeStack, bin_folder: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "tasks" / f"{task}.md").read_text(encoding="utf-8")
    script = "set -eu\n" + "".join(BLOCK.findall(page)).replace("smollm2-135m", BASE)
    ended = subprocess.run(
        ["sh"],
        input=script,
        env={**stack.environment, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PAGE_SECONDS,
        check=False,
    )
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"
    assert ended.stdout.startswith("The stack is running already.\n")
    jobs = script.count("graft tune create")
    assert ended.stdout.count("Training needs about") == jobs
    assert ended.stdout.count(f"is ready. Try it: graft chat {BASE}:") == jobs
