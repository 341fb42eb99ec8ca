"""Where files lie that more than one process reads: below the home on one machine, in a bucket (S3) across machines.

Owns the names below that place, the copies of them in a host's cache, and what is said when the storage fails. Files
are written whole on the host's own disk first and put in one step; what is named by somebody is therefore there and
whole. Does not know what is in the files. fsspec and its file systems are imported when a URL is first used.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.domain.errors import FailedPrecondition, NotFound, Unavailable
from graft.settings import Settings, cache_folder

MANIFEST = ".graft-files.json"
"""Written last into a folder: names and sizes of its files. A folder without it is not whole."""
UNUSED_SECONDS = 7 * 24 * 3600
"""A file in the cache that nothing has asked for in a week goes when another comes: longer than most jobs wait."""
CONNECT_SECONDS = 5
ATTEMPTS = 4
"""Of each request, by the client itself, with its back-off: a moment without the network is no error."""


@dataclass(frozen=True)
class Storage:
    """A place for files. Picklable: training workers and replicas get it with their work. All calls block.

    Every call raises Unavailable (STORAGE_UNAVAILABLE) when the storage does not answer, FailedPrecondition
    (STORAGE_REFUSED) when it refuses the credentials or the request, NotFound (STORAGE_OBJECT_MISSING) for what is
    not there.
    """

    root: str
    """A folder, or a URL such as `s3://bucket/prefix`."""
    endpoint_url: str = ""
    """Of an S3-compatible server; empty: `AWS_ENDPOINT_URL_S3`, `AWS_ENDPOINT_URL` or Amazon's."""

    @property
    def shared(self) -> bool:
        """True for a URL: what is there has to be put and fetched."""
        return is_url(self.root)

    def uri(self, *parts: str) -> str:
        """The name of a file or folder below the root."""
        return "/".join([self.root.rstrip("/"), *parts])

    def put_file(self, file: Path, uri: str) -> None:
        """Copies a file up; it is there whole or not at all."""
        with self._told(uri):
            system = self.file_system()
            self._make_parent(system, uri)
            system.put_file(str(file), _path(uri))

    def put_folder(self, folder: Path, uri: str, *, by_content: bool = False) -> None:
        """Copies a folder's files up, and then the manifest that makes it whole.

        `by_content`: its name is its content's, so that what somebody else has put there meanwhile stays whole.
        """
        files = {str(file.relative_to(folder)): file.stat().st_size for file in _files(folder)}
        with self._told(uri):
            system = self.file_system()
            if not by_content:
                with suppress(FileNotFoundError):
                    system.rm_file(_path(f"{uri}/{MANIFEST}"))  # of a folder that is put again
            for name in files:
                self._make_parent(system, f"{uri}/{name}")
                system.put_file(str(folder / name), _path(f"{uri}/{name}"))
            system.pipe_file(_path(f"{uri}/{MANIFEST}"), json.dumps(files).encode())

    def write(self, uri: str, content: bytes) -> None:
        """Writes a small file."""
        with self._told(uri):
            system = self.file_system()
            self._make_parent(system, uri)
            system.pipe_file(_path(uri), content)

    def read(self, uri: str) -> bytes:
        """A small file's content."""
        with self._told(uri):
            if not is_url(uri):
                return Path(uri).read_bytes()
            content: bytes = self.file_system().cat_file(_path(uri))
        return content

    def names(self, uri: str) -> list[str]:
        """Names of the files below a folder, relative to it; none when it is not there."""
        with self._told(uri):
            root = _path(uri).rstrip("/") + "/"
            system = self.file_system()
            system.invalidate_cache()
            found = system.find(root.rstrip("/"))
        return sorted(name.removeprefix(root) for name in found if name.startswith(root))

    def delete(self, uri: str) -> None:
        """Removes a file or a folder; it may be gone already."""
        with self._told(uri):
            system = self.file_system()
            system.invalidate_cache()
            with suppress(FileNotFoundError):
                system.rm(_path(uri), recursive=True)

    def fetch(self, uri: str, cache: Path | None = None) -> Path:
        """A file on this host: itself where `uri` is a path, else a copy in the cache, made once. What has been put
        under a name never changes, so that a copy is never old. `cache` is this host's own when None."""
        if not is_url(uri):
            return Path(uri)
        target = self.cached(uri, cache)
        if target.is_file():
            os.utime(target)
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        _drop_unused(target.parent)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as temporary, self._told(uri):
            fresh = Path(temporary) / target.name
            self.file_system().get_file(_path(uri), str(fresh))
            fresh.replace(target)
        return target

    def cached(self, uri: str, cache: Path | None = None) -> Path:
        """Where `fetch` keeps a file."""
        name = hashlib.sha256(uri.encode()).hexdigest()[:16]
        return (cache or cache_folder()) / "storage" / f"{name}-{uri.rpartition('/')[2]}"

    def fetch_folder(self, uri: str, target: Path) -> Path:
        """Copies a whole folder to `target`, which is whole or not there; what is there already is kept."""
        if target.is_dir():
            return target
        files: dict[str, int] = json.loads(self.read(f"{uri}/{MANIFEST}"))
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as temporary:
            fresh = Path(temporary) / target.name
            for name, size in files.items():
                (fresh / name).parent.mkdir(parents=True, exist_ok=True)
                with self._told(f"{uri}/{name}"):
                    self.file_system().get_file(_path(f"{uri}/{name}"), str(fresh / name))
                    if (found := (fresh / name).stat().st_size) != size:
                        raise OSError(f"it has {found} bytes where {size} were put")
            try:
                fresh.rename(target)
            except OSError:
                if not target.is_dir():  # else somebody else was first
                    raise
        return target

    def has_folder(self, uri: str) -> bool:
        """Whether a whole folder is there."""
        with self._told(uri):
            system = self.file_system()
            system.invalidate_cache()
            return bool(system.exists(_path(f"{uri}/{MANIFEST}")))

    def file_system(self) -> Any:
        """fsspec's file system of the root."""
        try:
            import fsspec

            protocol = self.root.partition("://")[0] if self.shared else "file"
            return fsspec.filesystem(protocol, **(self._s3_options() if protocol == "s3" else {}))
        except ImportError as error:
            raise FailedPrecondition(
                f"storage.url is {self.root}, whose package is missing: {error}. For S3: pip install graft[s3].",
                reason="PACKAGE_MISSING",
            ) from None

    def _s3_options(self) -> dict[str, Any]:
        return {
            # Never a listing from before: other hosts write here.
            "use_listings_cache": False,
            **({"endpoint_url": self.endpoint_url} if self.endpoint_url else {}),
            "config_kwargs": {"connect_timeout": CONNECT_SECONDS, "retries": {"max_attempts": ATTEMPTS}},
        }

    @staticmethod
    def _make_parent(system: Any, uri: str) -> None:
        if "file" in ((system.protocol,) if isinstance(system.protocol, str) else system.protocol):
            system.makedirs(_path(uri).rpartition("/")[0], exist_ok=True)  # a bucket has no folders

    @contextmanager
    def _told(self, uri: str) -> Iterator[None]:
        where = f"{uri} ({self.endpoint_url})" if self.endpoint_url else uri
        try:
            yield
        except FileNotFoundError as error:
            # S3's client says a missing bucket by the same error as a missing object.
            if "bucket" in str(error).lower() and "not exist" in str(error):
                raise FailedPrecondition(
                    f"The bucket of {where} does not exist. Create it, or correct storage.url.",
                    reason="STORAGE_BUCKET_MISSING",
                ) from error
            raise NotFound(
                f"{where} is not in the storage.", reason="STORAGE_OBJECT_MISSING", metadata={"uri": uri}
            ) from error
        except PermissionError as error:
            raise FailedPrecondition(
                f"The storage refuses {where}: {error} Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and what they "
                "may do.",
                reason="STORAGE_REFUSED",
            ) from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename is not None:
                raise  # this host's own disk
            raise _unavailable(where, error) from error
        except Exception as error:
            if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"):
                raise FailedPrecondition(
                    f"There are no credentials for {where}: {error}. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
                    reason="STORAGE_REFUSED",
                ) from error
            if type(error).__module__.partition(".")[0] in ("botocore", "aiobotocore", "aiohttp"):
                raise _unavailable(where, error) from error
            raise


LOCAL = Storage("")
"""For processes that share this host's disk."""


def open_storage(settings: Settings) -> Storage:
    """The storage of the settings; the home where they name none."""
    return Storage(settings.storage.url.rstrip("/") or str(settings.home.path), settings.storage.endpoint_url)


def base_model_uri(storage: Storage, digest: str) -> str:
    """Where the base model with this digest is in a shared storage, for hosts that have none."""
    return storage.uri("base_models", digest.removeprefix("sha256:"))


def share_base_model(storage: Storage, path: str, digest: str) -> None:
    """Puts a base model where every host can fetch it, once for all. Raises as `Storage`."""
    if storage.shared and not storage.has_folder(uri := base_model_uri(storage, digest)):
        storage.put_folder(Path(path), uri, by_content=True)


def fetch_base_model(storage: Storage, path: str, digest: str) -> Path:
    """The base model's folder on this host: `path`, or, where nothing is there, a copy from the shared storage."""
    if (Path(path) / "config.json").is_file() or not storage.shared:
        return Path(path)
    name = digest.removeprefix("sha256:")
    return storage.fetch_folder(base_model_uri(storage, digest), cache_folder() / "base_models" / f"fetched-{name}")


def is_url(place: str) -> bool:
    """True for what fsspec reads, false for a path of this host."""
    return "://" in place


def _unavailable(where: str, error: Exception) -> Unavailable:
    text = str(error).strip().splitlines()
    return Unavailable(
        f"The storage at {where} does not answer as it should ({type(error).__name__}: {text[0] if text else ''}).",
        reason="STORAGE_UNAVAILABLE",
        retry_after_seconds=2.0,
    )


def _path(uri: str) -> str:
    """As fsspec's own file systems take it."""
    return uri.partition("://")[2] if is_url(uri) else uri


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _drop_unused(folder: Path) -> None:
    old = time.time() - UNUSED_SECONDS
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            if path.stat().st_mtime < old:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
