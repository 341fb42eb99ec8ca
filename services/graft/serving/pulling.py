"""Brings adapters to the replica: from the registry, or from a folder that is already there; proven in both cases."""

import asyncio
import hashlib
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Protocol

from graft.domain.errors import FailedPrecondition
from graft.domain.resources import BaseModel
from graft.registry.digest import adapter_digest
from graft.serving.prove import BaseShapes, base_shapes, prove
from graft.serving.residency import Ref
from graft.settings import cache_folder
from graft.storage import LOCAL, Storage, is_url

PULLS_AT_ONCE = 8
"""More would not come faster over one link; the others wait."""
KEPT_POLICIES = 2
"""Of a run: the newest, and the one that is unloaded once that is loaded."""


class Registry(Protocol):
    """The part of the registry that serving needs (`graft.registry.mlflow_registry.Registry`)."""

    def pull(self, registered_model: str, version: int, digest: str) -> Path:
        """Downloads a version into the cache, keyed by digest. Blocks."""


class ProvingPuller:
    """Pulls in threads of its own. `open_registry` is called once, at the first need or by `warm`."""

    def __init__(
        self,
        base: BaseModel,
        max_lora_rank: int,
        open_registry: Callable[[], Registry],
        storage: Storage = LOCAL,
        cache: Path | None = None,
    ) -> None:
        self._storage = storage
        self._cache = cache or cache_folder()
        self._base = base
        self._max_lora_rank = max_lora_rank
        self._open_registry = open_registry
        # Not asyncio's own threads: while a registry does not answer, an engine that has died could not be replaced.
        self._threads = ThreadPoolExecutor(PULLS_AT_ONCE, thread_name_prefix="pull")

    async def pull(self, ref: Ref) -> Path:
        """The proven folder. Raises FailedPrecondition naming the file and fault, or what the registry raises."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._pull, ref)

    def warm(self) -> None:
        """Opens the registry, whose client takes seconds to import, before the first request needs it. Blocks."""
        _ = self._registry

    @cached_property
    def _registry(self) -> Registry:
        return self._open_registry()

    @cached_property
    def _shapes(self) -> BaseShapes:
        return base_shapes(self._base)

    def _pull(self, ref: Ref) -> Path:
        if ref.path:
            return self._proven(ref, self._fetch(ref) if is_url(ref.path) else Path(ref.path))
        folder = self._registry.pull(ref.registered_model, ref.version, ref.digest)
        try:
            return self._proven(ref, folder)
        except FailedPrecondition:
            if _is(folder, ref.digest):
                raise
            # What was downloaded had been proven: a machine that lost its power may keep a part of it.
            shutil.rmtree(folder, ignore_errors=True)
            return self._proven(ref, self._registry.pull(ref.registered_model, ref.version, ref.digest))

    def _proven(self, ref: Ref, folder: Path) -> Path:
        if not folder.is_dir():
            raise FailedPrecondition(
                f"Adapter {ref.model} cannot be served: its folder does not exist.",
                reason="ADAPTER_INVALID",
                metadata={"model": ref.model, "fault": "missing folder"},
            )
        prove(
            folder,
            self._shapes,
            model=ref.model,
            max_lora_rank=self._max_lora_rank,
            expected_digest=ref.digest,
        )
        return folder

    def _fetch(self, ref: Ref) -> Path:
        """A policy of a run on another host. Each update leaves one: those before are unloaded by now, and go."""
        run = hashlib.sha256(ref.path.rpartition("/")[0].encode()).hexdigest()[:16]
        fetched = self._storage.fetch_folder(
            ref.path, self._cache / "policies" / run / ref.digest.removeprefix("sha256:")
        )
        there = [path for path in fetched.parent.iterdir() if not path.name.startswith(".")]
        for old in sorted(there, key=_written_seconds)[:-KEPT_POLICIES]:
            shutil.rmtree(old, ignore_errors=True)
        return fetched


def _written_seconds(path: Path) -> float:
    """When a folder was written; long ago, where another replica of this host has just removed it."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _is(folder: Path, digest: str) -> bool:
    try:
        return adapter_digest(folder) == digest
    except FileNotFoundError:
        return False
