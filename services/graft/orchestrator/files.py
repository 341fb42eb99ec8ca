"""What the orchestrator reads of files: data sets, and what a run has left. Blocking calls."""

import shutil
from dataclasses import replace
from pathlib import Path

from graft.domain.errors import NotFound
from graft.domain.jobs import Job
from graft.domain.resources import Dataset
from graft.storage import Storage
from graft.training.spec import MODEL, RESULTS, TRAINED_ADAPTER, run_key


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


def located(storage: Storage, dataset: Dataset) -> Dataset:
    """The data set with the path that its file has on this host as its `uri`. Raises as `dataset_path`."""
    return replace(dataset, uri=str(dataset_path(storage, dataset)))


def fetch_results(storage: Storage, job: Job, output_dir: Path) -> None:
    """What the run has put into the shared storage, below `output_dir`; what is there already is kept."""
    if not storage.shared:
        return
    for name in RESULTS:
        uri = storage.uri(run_key(job.id, job.attempt), name)
        if not (output_dir / name).is_dir() and storage.has_folder(uri):
            storage.fetch_folder(uri, output_dir / name)


def drop_copies(storage: Storage, output_dir: Path) -> None:
    """Removes what `fetch_results` has fetched and nobody reads again: models are large."""
    if storage.shared:
        for name in (TRAINED_ADAPTER, MODEL):
            shutil.rmtree(output_dir / name, ignore_errors=True)
