"""Pages of the documentation, run as they stand: every block in order, by a shell, against the running stack."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.tiny_jobs import BASE
from tests.support.whole_stack import WholeStack
from tests.unit.test_docs import BLOCK, ROOT

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

TASKS = ("chat", "text-classification", "question-answering", "summarisation")
PAGE_SECONDS = 400.0
"""Tells a page from a hang: two jobs of ten steps, each with the start of its worker, and the other pages beside it."""


@pytest.fixture(scope="module")
def bin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the PATH with `graft` in it, as an activated environment has it."""
    folder = tmp_path_factory.mktemp("bin")
    command = folder / "graft"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m graft.cli.main "$@"\n')
    command.chmod(0o755)
    return folder


def script(task: str) -> str:
    page = (ROOT / "docs" / "tasks" / f"{task}.md").read_text(encoding="utf-8")
    return "set -eu\n" + "".join(BLOCK.findall(page)).replace("smollm2-135m", BASE)


@pytest.fixture(scope="module")
def ended(
    stack: WholeStack, bin_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, "subprocess.CompletedProcess[str]"]:
    """What each page printed. All run at once, as people do on one stack: a page by itself keeps one core busy."""

    def run(task: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            ["sh"],
            input=script(task),
            env={**stack.environment, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"},
            cwd=tmp_path_factory.mktemp(task),
            capture_output=True,
            text=True,
            timeout=PAGE_SECONDS,
            check=False,
        )

    with ThreadPoolExecutor(len(TASKS)) as pool:
        return dict(zip(TASKS, pool.map(run, TASKS), strict=True))


@pytest.mark.parametrize("task", TASKS)
def test_a_page_runs_as_it_stands(task: str, ended: dict[str, "subprocess.CompletedProcess[str]"]) -> None:
    page = ended[task]
    assert page.returncode == 0, f"{page.stdout}\n{page.stderr}"
    assert page.stdout.startswith("The stack is running already.\n")
    jobs = script(task).count("graft tune create")
    assert page.stdout.count("Training needs about") == jobs
    assert page.stdout.count(f"is ready. Try it: graft chat {BASE}:") == jobs
