"""`graft models pull` with the hub's own client, against a hub on loopback."""

import asyncio
import shutil
import signal
from pathlib import Path

import psutil
import pytest

from graft.registry.hub import _local_fault
from tests.support.command import Ran, ended, started
from tests.support.fake_hub import COMMIT, fake_hub
from tests.support.tiny_llama import make_tiny_llama

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_tiny_llama(tmp_path_factory.mktemp("repository"))
    (folder / "onnx").mkdir()
    shutil.copy(folder / "model.safetensors", folder / "onnx")
    (folder / "tokenizer_tiny.py").write_text("raise SystemExit('code of the repository ran')\n")
    (folder / "modeling_tiny.py").write_text("raise SystemExit('code of the repository ran')\n")
    (folder / "pytorch_model.bin").write_bytes(b"not wanted")
    return folder


def settings(home: Path, endpoint: str, offline: str = "0") -> dict[str, object]:
    """All that the hub's client reads, whatever the environment of the tests says of it."""
    return {"GRAFT_HOME": home, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": offline, "HF_HOME": home / "hf"}


async def run(home: Path, endpoint: str, *arguments: str, offline: str = "0") -> Ran:
    """As a process of its own: the hub's client reads its address and switches once."""
    return await ended(await started("models", *arguments, **settings(home, endpoint, offline)))


async def test_weights_tokenizer_and_configuration_are_pulled_once_and_nothing_else(
    repository: Path, tmp_path: Path
) -> None:
    with fake_hub("org/tiny", repository, "mit") as hub:
        await run(tmp_path, hub.url, "add", "theirs", "hub:org/tiny")
        assert hub.asked == []
        pulled = await run(tmp_path, hub.url, "pull", "theirs", "--json")
        assert pulled.code == 0, pulled.err
        told = pulled.json
        assert (told["state"], told["license"], told["source"]) == ("ready", "mit", "hub org/tiny@main")
        assert told["lineage"] == {"from": "hub:org/tiny", "revision": COMMIT, "license": "mit"}
        folder = Path(told["folder"])
        assert {path.name for path in folder.iterdir()} == {
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            "graft-model.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        }
        assert (folder / "model.safetensors").read_bytes() == (repository / "model.safetensors").read_bytes()
        hub.asked.clear()
        assert (await run(tmp_path, hub.url, "pull", "theirs")).code == 0
        assert hub.asked == []


async def test_a_pull_that_was_cut_off_goes_on_where_it_was(repository: Path, tmp_path: Path) -> None:
    with fake_hub("org/tiny", repository, "mit") as hub:
        await run(tmp_path, hub.url, "add", "theirs", "hub:org/tiny")
        hub.break_on = "tokenizer.json"
        cut_off = await run(tmp_path, hub.url, "pull", "theirs", "--json")
        assert (cut_off.code, cut_off.error["reason"]) == (4, "HUB_UNREACHABLE")
        listed = await run(tmp_path, hub.url, "list", "--local", "--json")
        assert {one["name"]: one["state"] for one in listed.json}["theirs"] == "not pulled"
        hub.break_on = ""
        assert (await run(tmp_path, hub.url, "pull", "theirs")).code == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
async def test_a_pull_ends_within_a_file_and_leaves_no_process(
    repository: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    with fake_hub("org/tiny", repository, "mit") as hub:
        await run(tmp_path, hub.url, "add", "theirs", "hub:org/tiny")
        hub.slow_on = "model.safetensors"
        pulling = await started("models", "pull", "theirs", **settings(tmp_path, hub.url))
        assert await asyncio.to_thread(hub.slow.wait, 60)
        children = psutil.Process(pulling.pid).children(recursive=True)
        pulling.send_signal(number)
        assert (await ended(pulling)).code == code
        assert not hub.released.is_set()
        assert [child.pid for child in children if psutil.pid_exists(child.pid)] == []
        hub.slow_on = ""
        assert (await run(tmp_path, hub.url, "pull", "theirs")).code == 0


def _caused(error: Exception) -> Exception:
    outer = RuntimeError("the client's own words")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device"), "DISK_FULL"),
        (_caused(OSError(28, "No space left on device")), "DISK_FULL"),
        (RuntimeError("Data processing error: No space left on device (os error 28)"), "DISK_FULL"),
        (PermissionError(13, "Permission denied", "/cache/x"), "CACHE_NOT_WRITABLE"),
        (ConnectionRefusedError(111, "Connection refused"), None),
        (TimeoutError("timed out"), None),
    ],
)
def test_a_fault_of_this_machine_is_not_told_as_one_of_the_hub(error: Exception, reason: str | None) -> None:
    told = _local_fault(error, Path("/cache/base_models/.pull-x"))
    assert (told.reason if told else None) == reason


async def test_a_file_that_cannot_be_written_is_told(repository: Path, tmp_path: Path) -> None:
    with fake_hub("org/tiny", repository, "mit") as hub:
        await run(tmp_path, hub.url, "add", "theirs", "hub:org/tiny")
        hub.break_on = "tokenizer.json"
        await run(tmp_path, hub.url, "pull", "theirs")
        hub.break_on = ""
        (partial,) = (tmp_path / "cache" / "base_models").glob(".pull-*")
        shutil.rmtree(partial / ".cache")
        (partial / ".cache").write_text("in the way")
        told = await run(tmp_path, hub.url, "pull", "theirs", "--json")
    assert (told.code, told.error["reason"]) == (2, "CACHE_NOT_WRITABLE")


async def test_what_cannot_be_pulled_is_told_in_a_sentence(repository: Path, tmp_path: Path) -> None:
    with fake_hub("org/tiny", repository, "mit") as hub:
        for name, source in (("a", "hub:org/absent"), ("b", "hub:org/tiny")):
            await run(tmp_path, hub.url, "add", name, source)
        await run(tmp_path, hub.url, "add", "c", "hub:org/tiny", "--revision", "v9")
        absent = await run(tmp_path, hub.url, "pull", "a")
        offline = await run(tmp_path, hub.url, "pull", "b", offline="1")
        revision = await run(tmp_path, hub.url, "pull", "c")
    unreachable = await run(tmp_path, "http://127.0.0.1:9", "pull", "b")
    assert (absent.code, "The hub has no org/absent" in absent.err) == (3, True)
    assert (offline.code, "HF_HUB_OFFLINE is set" in offline.err) == (2, True)
    assert (revision.code, "no revision 'v9'" in revision.err) == (3, True)
    assert (unreachable.code, "cannot be downloaded from http://127.0.0.1:9" in unreachable.err) == (4, True)
