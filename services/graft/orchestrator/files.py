"""What the orchestrator reads and shares of files: data sets, what a run has left, base models. Blocking calls."""

import shutil
from pathlib import Path

from graft.domain.errors import NotFound
from graft.domain.jobs import Job
from graft.domain.resources import BaseModel, Dataset
from graft.storage import Storage, base_model_uri
from graft.training.spec import run_key

RESULTS = ("adapter", "trained_adapter", "model")
"""Folders that a run may leave (`graft.training.results`, which needs torch)."""


def dataset_path(storage: Storage, dataset: Dataset) -> Path:
    """A data set's file on this host. Raises NotFound (DATASET_FILE_MISSING) when it is gone, and as `Storage`."""
    try:
        path = storage.fetch(dataset.uri)
        if path.is_file():
            return path
    except NotFound:
        pass
    raise NotFound(
        f"The file of data set {dataset.id!r} is gone from the store's disk. Upload it again.",
        reason="DATASET_FILE_MISSING",
        metadata={"dataset": dataset.id},
    )


def fetch_results(storage: Storage, job: Job, output_dir: Path) -> None:
    """What the run has put into the shared storage, below `output_dir`; what is there already is kept."""
    if not storage.shared:
        return
    for name in RESULTS:
        uri = storage.uri(run_key(job.id, job.attempt), name)
        if not (output_dir / name).is_dir() and storage.has_folder(uri):
            storage.fetch_folder(uri, output_dir / name)


def drop_copies(storage: Storage, output_dir: Path) -> None:
    """Removes what `fetch_results` has fetched: the registry and the storage both have it."""
    if storage.shared:
        shutil.rmtree(output_dir, ignore_errors=True)


def share_base_model(storage: Storage, base: BaseModel) -> None:
    """Puts the base model where every host can fetch it, once for all."""
    if storage.shared:
        storage.put_folder(Path(base.path), base_model_uri(storage, base.digest))
