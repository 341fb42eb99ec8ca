"""Where a replica brings an adapter from: a folder, the storage that hosts share, or the registry."""

import asyncio
import shutil
import threading
from pathlib import Path

import pytest

from graft.domain.errors import FailedPrecondition, NotFound
from graft.registry.digest import adapter_digest
from graft.serving.pulling import ProvingPuller
from graft.serving.residency import Ref
from graft.storage import Storage
from tests.support.adapters import make_adapter, tiny_base
from tests.support.tiny_llama import make_tiny_llama


class NoRegistry:
    """Whoever asks it is wrong."""

    def pull(self, registered_model: str, version: int, digest: str) -> Path:
        raise AssertionError((registered_model, version, digest))


async def test_a_policy_of_another_host_is_fetched_from_the_storage_once_and_proven(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    storage = Storage(f"file://{tmp_path}/shared")
    base = make_tiny_llama(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "trained")
    digest = adapter_digest(adapter)
    uri = storage.uri("runs", "ft-1", "1", "policy", "step-3")
    storage.put_folder(adapter, uri)
    shutil.rmtree(adapter)
    puller = ProvingPuller(tiny_base(base), 64, NoRegistry, storage, tmp_path / "cache")
    folder = await puller.pull(Ref("tiny:ft-1-step-3", digest, path=uri))
    assert adapter_digest(folder) == digest
    storage.delete(uri)
    assert await puller.pull(Ref("tiny:ft-1-step-3", digest, path=uri)) == folder
    with pytest.raises(NotFound):
        await puller.pull(Ref("tiny:ft-1-step-4", "sha256:other", path=uri))


async def test_of_the_policies_of_a_run_only_the_newest_stay_in_the_cache(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    storage = Storage(f"file://{tmp_path}/shared")
    base = make_tiny_llama(tmp_path / "base")
    puller = ProvingPuller(tiny_base(base), 64, NoRegistry, storage, tmp_path / "cache")
    for step in range(1, 5):
        adapter = make_adapter(base, tmp_path / f"trained-{step}", seed=step)
        uri = storage.uri("runs", "ft-1", "1", "policy", f"step-{step}")
        storage.put_folder(adapter, uri)
        newest = await puller.pull(Ref(f"tiny:ft-1-step-{step}", adapter_digest(adapter), path=uri))
        # As a folder that another replica of this host removes once it has been seen.
        (newest.parent / "gone").unlink(missing_ok=True)
        (newest.parent / "gone").symlink_to(tmp_path / "nowhere")
    assert newest.is_dir()
    assert len([path for path in newest.parent.iterdir() if path.is_dir()]) == 2


async def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    puller = ProvingPuller(tiny_base(tmp_path), 64, NoRegistry)
    with pytest.raises(FailedPrecondition, match="folder does not exist"):
        await puller.pull(Ref("tiny:a@1", "sha256:a", path=str(tmp_path / "gone")))


class SilentRegistry:
    """Does not answer until it is told to."""

    def __init__(self) -> None:
        self.answering = threading.Event()

    def pull(self, registered_model: str, version: int, digest: str) -> Path:
        self.answering.wait(30)
        raise NotFound(f"MLflow has no {registered_model}@{version} ({digest}).")


async def test_pulls_that_wait_for_the_registry_leave_the_replica_its_threads(tmp_path: Path) -> None:
    registry = SilentRegistry()
    puller = ProvingPuller(tiny_base(tmp_path), 64, lambda: registry, cache=tmp_path)
    pulls = [asyncio.create_task(puller.pull(Ref(f"tiny:a{n}@1", f"sha256:{n}", "m", n))) for n in range(40)]
    await asyncio.sleep(0.1)
    async with asyncio.timeout(20):
        await asyncio.to_thread(threading.get_ident)  # as an engine that is started
    registry.answering.set()
    assert all(isinstance(found, NotFound) for found in await asyncio.gather(*pulls, return_exceptions=True))


class KeepingRegistry:
    """Keeps what it has downloaded, as the real one does."""

    def __init__(self, published: Path, cache: Path) -> None:
        self._published = published
        self._kept = cache / "kept"

    def pull(self, *_: object) -> Path:
        if not self._kept.is_dir():
            shutil.copytree(self._published, self._kept)
        return self._kept


async def test_a_kept_adapter_that_the_disk_has_lost_a_part_of_is_pulled_again(tmp_path: Path) -> None:
    base = make_tiny_llama(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "trained")
    digest = adapter_digest(adapter)
    puller = ProvingPuller(tiny_base(base), 64, lambda: KeepingRegistry(adapter, tmp_path), cache=tmp_path)
    folder = await puller.pull(Ref("tiny:a@1", digest, "m", 1))
    for damage in ((lambda weights: weights.write_bytes(b"")), Path.unlink):
        damage(folder / "adapter_model.safetensors")
        assert adapter_digest(await puller.pull(Ref("tiny:a@1", digest, "m", 1))) == digest
    low = ProvingPuller(tiny_base(base), 1, lambda: KeepingRegistry(adapter, tmp_path), cache=tmp_path)
    shutil.rmtree(adapter)  # what is whole and refused is not pulled again
    with pytest.raises(FailedPrecondition, match="max_lora_rank"):
        await low.pull(Ref("tiny:a@1", digest, "m", 1))
