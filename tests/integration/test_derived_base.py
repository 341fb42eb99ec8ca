"""`graft models derive` as a command: a process of its own cuts, heals and writes a base model."""

import asyncio
import json
import signal
from pathlib import Path

import psutil
import pytest
import yaml

from graft.data.raw_text import python_documentation
from tests.support.command import graft, started
from tests.support.tiny_llama import make_tiny_llama

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("deep"), layers=4)


async def test_a_smaller_base_is_derived_and_entered_with_its_lineage(deep: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    await graft("models", "add", "deep", deep, "--license", "MIT", GRAFT_HOME=home)
    text = tmp_path / "text.jsonl"
    rows = [{"text": f"Line {number}: the quick brown fox and its {number % 7} cubs. " * 12} for number in range(60)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    derived = await graft(
        *(
            "models",
            "derive",
            "deep",
            "--layers",
            "2",
            "--name",
            "small",
            "--data",
            text,
            "--tokens",
            "20000",
            "--json",
        ),
        GRAFT_HOME=home,
    )
    assert derived.code == 0, derived.err
    assert derived.json_lines[-1]["model"]["layers"] == 2
    entry = yaml.safe_load((home / "base_models.yaml").read_text())["small"]
    assert entry == {"folder": "base_models/small", "license": "MIT", "derived": {"from": "deep", "layers": 2}}
    folder = home / "base_models" / "small"
    lineage = json.loads((folder / "graft-model.json").read_text())
    assert lineage["layers_kept"] == [0, 3]
    assert lineage["perplexity"]["after_healing"] < 0.5 * lineage["perplexity"]["after_cut"]
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}
    assert (folder / "chat_template.jinja").read_bytes() == (deep / "chat_template.jinja").read_bytes()
    assert (folder / "tokenizer.json").read_bytes() == (deep / "tokenizer.json").read_bytes()
    assert [path.name for path in (home / "base_models").iterdir()] == ["small"]

    taken, few, many = await asyncio.gather(
        graft("models", "derive", "deep", "--layers", "2", "--name", "small", GRAFT_HOME=home),
        graft("models", "derive", "deep", "--layers", "1", "--name", "less", GRAFT_HOME=home),
        graft("models", "derive", "deep", "--layers", "4", "--name", "less", GRAFT_HOME=home),
    )
    assert "already" in taken.err
    assert "--layers must be from 2 to 3, and is 1" in few.err
    assert "--layers must be from 2 to 3, and is 4" in many.err


async def test_too_little_text_is_told_and_leaves_nothing_nor_what_others_left(deep: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    await graft("models", "add", "deep", deep, GRAFT_HOME=home)
    text = tmp_path / "text.txt"
    text.write_text("short")
    abandoned = home / "base_models" / ".derive-abandoned"
    abandoned.mkdir(parents=True)
    ran = await graft("models", "derive", "deep", "--layers", "2", "--name", "x", "--data", text, GRAFT_HOME=home)
    assert (ran.code, "Give more text" in ran.err) == (2, True)
    assert list((home / "base_models").iterdir()) == []


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGKILL, -signal.SIGKILL)],
)
async def test_however_the_command_is_ended_it_leaves_no_folder_and_no_process(
    deep: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    home = tmp_path / "home"
    await graft("models", "add", "deep", deep, GRAFT_HOME=home)
    running = await started("models", "derive", "deep", "--layers", "2", "--name", "x", "--json", GRAFT_HOME=home)
    assert running.stdout is not None
    async with asyncio.timeout(60):
        line = b""
        while b'"phase"' not in line:  # the first comes from the process that heals
            line = await running.stdout.readline()
            assert line, "it has ended"
        (healing,) = psutil.Process(running.pid).children()
        running.send_signal(number)
        await running.communicate()
        while psutil.pid_exists(healing.pid):
            assert number is signal.SIGKILL
            await asyncio.sleep(0.05)
    assert running.returncode == code
    assert list((home / "base_models").iterdir()) == []
    assert "x:" not in (home / "base_models.yaml").read_text()


async def test_a_folder_that_is_there_is_refused_before_it_starts(deep: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    await graft("models", "add", "deep", deep, GRAFT_HOME=home)
    (home / "base_models" / "left").mkdir(parents=True)
    ran = await graft("models", "derive", "deep", "--layers", "2", "--name", "left", GRAFT_HOME=home)
    assert (ran.code, ran.out) == (1, "")
    assert "left is there already, though the catalogue does not name it" in ran.err


def test_python_has_enough_prose_to_heal_on() -> None:
    assert sum(map(len, python_documentation())) > 1_000_000
