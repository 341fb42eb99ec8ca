"""Runs, adapter versions and aliases in MLflow: plain files and `create_model_version`, no pickled flavour.

Owns how Graft's names and lineage are written there. Does not know the store, and what an adapter is good for.
All calls block. Raises Unavailable while MLflow does not answer, NotFound for what it does not have.
"""

import functools
import json
import os
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from graft.domain.errors import FailedPrecondition, NotFound, Unavailable
from graft.domain.jobs import ServedAs, Tuning
from graft.domain.names import parse_registered_model, registered_model
from graft.domain.resources import Adapter, AdapterVersion, RegistrySnapshot
from graft.registry.digest import FILES, MODEL_CONFIG, adapter_digest, model_digest

# A request to a server that is away fails within seconds; callers have their own patience.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# From the bucket itself, by signed URLs, MLflow would try each file for minutes; through its server silence is an error
# after the 20 s above, and only the server needs a way to the bucket.
os.environ.setdefault("MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD", "false")

from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts, list_artifacts
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from requests import HTTPError

ADAPTER_PATH = "adapter"
MODEL_PATH = "model"
TRAINED_ADAPTER_PATH = "trained_adapter"
PULLED_SUFFIXES = (".safetensors", ".json", ".md", ".jinja", ".txt", ".yaml", ".model")
"""Never a pickle: only these are kept of a download."""
RETAINED = "delta_retained_fraction"
"""Name of a job's metric."""
TASK_TAG = "graft.task"
_NEEDED_TAGS = {"graft.digest", "graft.base_model_digest", "graft.dataset_digest", "graft.job", "graft.rank"}
_NEEDED_TAGS |= {"graft.size_bytes", "graft.metrics"}
PARAM_BATCH = 100
"""MLflow's limit of parameters in one call."""


@dataclass(frozen=True)
class Publication:
    """A trained adapter or model that is to become a version."""

    project: str
    base_model: str
    adapter: str
    job_id: str
    attempt: int
    run_id: str
    folder: Path | None
    """The adapter as it is served; None where the model is what is served."""
    base_model_digest: str
    dataset_digest: str
    rank: int
    metrics: dict[str, float]
    task_definition: str = ""
    served_as: ServedAs = ServedAs.ADAPTER
    tuning: Tuning = Tuning.LORA
    model_folder: Path | None = None
    """The whole model, where there is one."""
    trained_folder: Path | None = None
    """The adapter as it was trained, where another is served."""


class Registry:
    """MLflow at `tracking_uri`. Pulled adapters are cached below `cache`, by content."""

    def __init__(self, tracking_uri: str, cache: Path) -> None:
        self._uri = tracking_uri
        self._client = MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)
        self._cache = cache

    def start_run(self, project: str, job_id: str, attempt: int, params: dict[str, str], tags: dict[str, str]) -> str:
        """The run of this attempt: made, or found when it was made before. Returns its id."""
        with self._translated(f"experiment graft-{project}"):
            experiment = self._experiment(f"graft-{project}")
            mine = f"tags.`graft.job` = '{job_id}' and tags.`graft.attempt` = '{attempt}'"
            found = self._client.search_runs([experiment], mine, max_results=1)
            all_tags = {
                "graft.job": job_id,
                "graft.attempt": str(attempt),
                "graft.code_version": code_version(),
                **tags,
            }
            run = found[0] if found else self._client.create_run(experiment, None, all_tags, f"{job_id}-{attempt}")
            run_id = str(run.info.run_id)
            # One that was found has its parameters, unless the call that made it did not come to write them.
            entries = [] if run.data.params else [Param(key, value[:6000]) for key, value in params.items()]
            for start in range(0, len(entries), PARAM_BATCH):
                self._client.log_batch(run_id, params=entries[start : start + PARAM_BATCH])
            return run_id

    def log_metrics(self, run_id: str, metrics: dict[str, float], step: int) -> None:
        """One point of each curve."""
        with self._translated(f"run {run_id}"):
            now_ms = int(datetime.now(UTC).timestamp() * 1000)
            self._client.log_batch(run_id, [Metric(key, value, now_ms, step) for key, value in metrics.items()])

    def log_file(self, run_id: str, path: Path) -> None:
        """Uploads one file as an artifact of its own name."""
        with self._translated(f"run {run_id}"):
            self._client.log_artifact(run_id, str(path))

    def finish_run(self, run_id: str, status: str) -> None:
        """`FINISHED`, `FAILED` or `KILLED`."""
        with self._translated(f"run {run_id}"):
            self._client.set_terminated(run_id, status)

    def publish(self, publication: Publication) -> AdapterVersion:
        """Uploads the folders and makes a version of them. A version that this job made before is returned instead.

        Raises FileNotFoundError when the adapter's folder lacks one of its two files, or the model's its config.json.
        """
        name = registered_model(publication.project, publication.base_model, publication.adapter)
        model = None if publication.model_folder is None else model_digest(publication.model_folder)
        if publication.folder is not None:
            served, files, path = publication.folder, list(FILES), ADAPTER_PATH
            digest = adapter_digest(served)
        elif publication.model_folder is not None and model is not None:
            served, path, digest = publication.model_folder, MODEL_PATH, model
            files = [file.name for file in served.glob("*.safetensors")]
        else:
            raise ValueError(f"Job {publication.job_id} publishes neither an adapter nor a model.")
        with self._translated(f"registered model {name}"):
            self._make_registered_model(name)
            for version in self._versions(f"name = '{name}' and tags.`graft.job` = '{publication.job_id}'"):
                if version.tags.get("graft.digest") == digest:
                    return _version(version)
            for folder, where in (
                (publication.folder, ADAPTER_PATH),
                (publication.model_folder, MODEL_PATH),
                (publication.trained_folder, TRAINED_ADAPTER_PATH),
            ):
                if folder is not None:
                    self._client.log_artifacts(publication.run_id, str(folder), where)
            root = self._client.get_run(publication.run_id).info.artifact_uri
            made = self._client.create_model_version(
                name,
                f"{root}/{path}",
                run_id=publication.run_id,
                tags={
                    "graft.job": publication.job_id,
                    "graft.attempt": str(publication.attempt),
                    "graft.digest": digest,
                    "graft.base_model_digest": publication.base_model_digest,
                    "graft.dataset_digest": publication.dataset_digest,
                    "graft.rank": str(publication.rank),
                    "graft.size_bytes": str(sum((served / file).stat().st_size for file in files)),
                    "graft.metrics": json.dumps(publication.metrics),
                    "graft.code_version": code_version(),
                    **({TASK_TAG: publication.task_definition} if publication.task_definition else {}),
                    "graft.served_as": publication.served_as.value,
                    "graft.tuning": publication.tuning.value,
                    **({} if model is None else {"graft.model_digest": model}),
                    **(
                        {"graft.delta_retained_fraction": f"{publication.metrics[RETAINED]:.6g}"}
                        if RETAINED in publication.metrics
                        else {}
                    ),
                },
            )
            return _version(self._client.get_model_version(name, made.version))

    def set_alias(self, project: str, base: str, adapter: str, alias: str, version: int) -> None:
        """Points an alias. Raises NotFound for an unknown adapter or version."""
        name = registered_model(project, base, adapter)
        with self._translated(f"{base}:{adapter}@{version}"):
            # Asked first: MLflow lets an alias point at a version that does not exist.
            self._client.get_model_version(name, str(version))
            self._client.set_registered_model_alias(name, alias, str(version))

    def snapshot(self) -> RegistrySnapshot:
        """All of Graft's adapters and versions. Registered models and versions of others are left out."""
        with self._translated("registry"):
            versions = tuple(_version(entry) for entry in self._versions("") if _is_ours(entry))
            models = list(self._pages(self._client.search_registered_models))
        numbers_of: dict[tuple[str, str, str], set[int]] = defaultdict(set)
        for version in versions:
            numbers_of[version.project, version.base_model, version.adapter].add(version.version)
        adapters: list[Adapter] = []
        for model in models:
            names = parse_registered_model(model.name)
            if names is None or names not in numbers_of:
                continue
            numbers = numbers_of[names]
            aliases = {alias: int(n) for alias, n in sorted(model.aliases.items()) if int(n) in numbers}
            created = _time(model.creation_timestamp)
            adapters.append(Adapter(*names, aliases, max(numbers), created))
        return RegistrySnapshot(tuple(adapters), versions)

    def pull(self, registered_model: str, version: int, digest: str) -> Path:
        """The version's adapter folder, downloaded once, proven against `digest`, then kept. Safe to call at once by
        many.

        Raises FailedPrecondition when the files are not those of the digest.
        """

        def download(temporary: Path) -> Path:
            source = self._client.get_model_version(registered_model, str(version)).source
            # One by one: of a folder MLflow tries every file, a minute each, before it says that the first has failed.
            for info in list_artifacts(artifact_uri=source, tracking_uri=self._uri):
                file = f"{source}/{info.path.rpartition('/')[2]}"
                if file.endswith(PULLED_SUFFIXES):
                    download_artifacts(artifact_uri=file, dst_path=str(temporary), tracking_uri=self._uri)
            folder = next((path.parent for path in temporary.rglob(FILES[0])), temporary)
            _prove(folder, adapter_digest, digest, registered_model, version)
            return folder

        return self._pull_once(self._cache / "adapters", registered_model, version, digest, download)

    def pull_model(self, registered_model: str, version: int, digest: str) -> Path:
        """The version's whole model as `pull` brings its adapter: a folder that transformers and vLLM load.

        `digest` is the version's own, also where that is an adapter's beside the model. Raises FailedPrecondition for
        a version without a model, and when the files are not those that were registered.
        """

        def download(temporary: Path) -> Path:
            found = self._client.get_model_version(registered_model, str(version))
            if found.tags.get("graft.digest") != digest:
                raise _changed(registered_model, version, digest, str(found.tags.get("graft.digest")))
            if "graft.model_digest" not in found.tags:
                raise FailedPrecondition(
                    f"Version {version} of registered model {registered_model} is an adapter without a model of its "
                    "own: it is served beside its base and needs no deployment.",
                    reason="NO_MODEL",
                )
            self._client.download_artifacts(found.run_id, MODEL_PATH, str(temporary))
            folder = next((path.parent for path in temporary.rglob(MODEL_CONFIG)), temporary)
            _prove(folder, model_digest, found.tags["graft.model_digest"], registered_model, version)
            return folder

        return self._pull_once(self._cache / "models", registered_model, version, digest, download)

    def _pull_once(
        self, cache: Path, registered_model: str, version: int, digest: str, download: Callable[[Path], Path]
    ) -> Path:
        """What `download` makes of an empty folder, kept by digest."""
        target = cache / digest.removeprefix("sha256:")
        if target.is_dir():
            return target
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".pull-") as temporary:
            with self._translated(f"version {version} of registered model {registered_model}"):
                folder = download(Path(temporary))
            try:
                folder.rename(target)
            except OSError:
                # Somebody else was first with the same content; anything else is a fault of the disk.
                if not target.is_dir():
                    raise
        return target

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        try:
            return str(self._client.create_experiment(name))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            return str(self._client.get_experiment_by_name(name).experiment_id)

    def _make_registered_model(self, name: str) -> None:
        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _versions(self, query: str) -> Iterator[Any]:
        return self._pages(lambda **page: self._client.search_model_versions(query, **page))

    @staticmethod
    def _pages(search: Callable[..., Any]) -> Iterator[Any]:
        token = None
        while True:
            page = search(max_results=1000, page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        try:
            yield
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                raise NotFound(
                    f"MLflow has no {what}.", reason="REGISTRY_ENTRY_NOT_FOUND", metadata={"name": what}
                ) from error
            raise Unavailable(
                f"MLflow at {self._uri} does not answer as it should ({error.error_code}). Is it running?",
                reason="REGISTRY_UNAVAILABLE",
                retry_after_seconds=2.0,
            ) from error
        except HTTPError as error:  # of files MLflow's client passes on what other calls wrap
            raise Unavailable(
                f"MLflow at {self._uri}, or what stands before it, refuses files "
                f"({str(error).partition(' for url')[0]}): whoever runs it has to allow them, also as large as models.",
                reason="REGISTRY_UNAVAILABLE",
                retry_after_seconds=2.0,
            ) from error
        except ConnectionError as error:
            raise Unavailable(
                f"MLflow at {self._uri} cannot be reached.", reason="REGISTRY_UNAVAILABLE", retry_after_seconds=2.0
            ) from error


@functools.cache
def code_version() -> str:
    """Graft's version for lineage, with the commit when it runs from a checkout: `graft 0.1.0 (3f2c1d0a9b8e)`.

    `-dirty` follows the commit when files differ from it.
    """
    version = f"graft {metadata.version('graft')}"

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)  # an installed package may lie in somebody else's checkout
        return f"{version} ({git('describe', '--always', '--dirty', '--abbrev=12', '--exclude=*')})"
    except (OSError, subprocess.SubprocessError):  # no git, or no checkout
        return version


def _prove(folder: Path, digest_of: Callable[[Path], str], expected: str, registered_model: str, version: int) -> None:
    """Drops what is no part of a version and compares the rest with its digest. Raises FailedPrecondition."""
    for path in folder.iterdir():
        if path.suffix not in PULLED_SUFFIXES and path.is_file():
            path.unlink()
    try:
        found = digest_of(folder)
    except FileNotFoundError as error:
        raise FailedPrecondition(
            f"The files of version {version} of registered model {registered_model} are incomplete: "
            f"{Path(error.filename).name} is missing. Train it again.",
            reason="ADAPTER_INCOMPLETE",
        ) from None
    if found != expected:
        raise _changed(registered_model, version, expected, found)


def _changed(registered_model: str, version: int, expected: str, found: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"The files of version {version} of registered model {registered_model} have changed: {expected} was "
        f"registered, {found} was downloaded. Restore them in MLflow's artifacts, or train it again.",
        reason="ADAPTER_DIGEST_MISMATCH",
        metadata={"expected": expected, "found": found},
    )


def _is_ours(entry: Any) -> bool:
    """Whether Graft published it, and nobody has taken off a tag since: one such version would hide all others."""
    return parse_registered_model(entry.name) is not None and entry.tags.keys() >= _NEEDED_TAGS


def _time(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)


def _version(entry: Any) -> AdapterVersion:
    names = parse_registered_model(entry.name)
    assert names is not None, entry.name
    tags = entry.tags
    return AdapterVersion(
        *names,
        version=int(entry.version),
        digest=tags["graft.digest"],
        base_model_digest=tags["graft.base_model_digest"],
        dataset_digest=tags["graft.dataset_digest"],
        job_id=tags["graft.job"],
        rank=int(tags["graft.rank"]),
        size_bytes=int(tags["graft.size_bytes"]),
        mlflow_run_id=entry.run_id,
        create_time=_time(entry.creation_timestamp),
        metrics=json.loads(tags["graft.metrics"]),
        task_definition=tags.get(TASK_TAG, ""),
        served_as=ServedAs(tags.get("graft.served_as", ServedAs.ADAPTER)),
    )
