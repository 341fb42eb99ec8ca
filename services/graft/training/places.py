"""Where a run's files lie on this host, and what of them goes to the storage that all hosts share.

Without such a storage everything lies in the run's folder below the home, and nothing here does anything. With one,
each host works in its own cache: data and base model are fetched into it, results put from it. Does not know Ray.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from graft.domain.errors import Unavailable
from graft.domain.jobs import EventLevel
from graft.settings import cache_folder
from graft.storage import fetch_base_model
from graft.training.spec import RunSpec, Tell

PATIENCE_SECONDS = 600.0
"""How long a run waits for the storage, for its data as for its result: as long as the orchestrator for a service."""
RETRY_SECONDS = 2.0
REPORTS = "reports.jsonl"
ERRORS = "error.log"

T = TypeVar("T")


def on_this_host(spec: RunSpec) -> RunSpec:
    """The same run with the paths of this host; nothing is fetched yet."""
    if spec.storage is None:
        return spec
    start = spec.start_from and replace(spec.start_from, cache=str(cache_folder()))
    return replace(spec, output_dir=str(cache_folder() / spec.output_key), start_from=start)


def with_files(spec: RunSpec) -> RunSpec:
    """`on_this_host`, with data and base model fetched. Raises as `Storage`."""
    if (storage := spec.storage) is None:
        return spec
    return replace(
        on_this_host(spec),
        base_model_path=str(fetch_base_model(storage, spec.base_model_path, spec.base_model_digest)),
        dataset_path=str(storage.fetch(spec.dataset_path)),
        validation_path=None if spec.validation_path is None else str(storage.fetch(spec.validation_path)),
    )


def put(spec: RunSpec, folder: Path) -> str:
    """Puts a folder of the run into the storage, and takes it from this host's disk. Returns where it is."""
    if spec.storage is None:
        return str(folder)
    uri = uri_of(spec, folder)
    spec.storage.put_folder(folder, uri)
    shutil.rmtree(folder)
    return uri


def patiently(ask: Callable[[], T], tell: Tell) -> T:
    """What `ask` returns, tried again while the storage is away: what took hours to train is not lost to a minute.

    Raises Unavailable after PATIENCE_SECONDS.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    told = False
    while True:
        try:
            return ask()
        except Unavailable as error:
            if time.monotonic() > deadline:
                raise
            if not told:
                told = True
                text = f"{error.message} Trying again for up to {PATIENCE_SECONDS:.0f} s."
                tell("message", {"message": text, "level": EventLevel.WARN.value})
            time.sleep(RETRY_SECONDS)


def uri_of(spec: RunSpec, path: Path) -> str:
    """Where a file or folder of the run is for everybody: itself without a storage."""
    if spec.storage is None:
        return str(path)
    return spec.storage.uri(spec.output_key, *path.relative_to(spec.output_dir).parts)


def remove(spec: RunSpec, uri: str) -> None:
    """Removes a folder of the run by what `put` returned. Raises as `Storage`."""
    if spec.storage is None:
        shutil.rmtree(uri, ignore_errors=True)
    else:
        spec.storage.delete(uri)


def ray_storage(spec: RunSpec) -> dict[str, Any]:
    """`RunConfig`'s own two arguments: Ray's controller and workers must see one folder."""
    if spec.storage is None:
        return {"storage_path": spec.output_dir}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    path = spec.storage.uri(spec.output_key).partition("://")[2]
    return {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(spec.storage.file_system()))}
