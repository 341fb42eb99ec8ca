"""Where a catalogue entry's folder is, and how it comes there: conversion of a packaged file, download from the hub.

Owns the folders below `cache/base_models`: each is made beside its place and renamed, so that what is there is whole.
Conversion has a process of its own (`graft.registry.convert`).
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from graft.domain.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from graft.registry.catalog import Entry, Folder, Hub, Packaged
from graft.registry.hub import download
from graft.registry.locks import locked
from graft.settings import Settings

Progress = Callable[[str], None]


def cache_folder(settings: Settings) -> Path:
    """Where folders that Graft makes itself lie, and what it has measured of all."""
    return settings.home.cache / "base_models"


def source_text(entry: Entry) -> str:
    """Where the weights come from, for people."""
    match entry.source:
        case Packaged(package):
            return f"package {package}"
        case Hub(repository, revision):
            return f"hub {repository}@{revision}"
        case Folder(derived_from="", origin=origin):
            return origin or "folder"
        case Folder(derived_from=base, layers=layers):
            return f"{layers} layers of {base}"


def ready_folder(settings: Settings, entry: Entry) -> Path | None:
    """The folder, or None when it is still to be made, or its package is not installed.

    Raises FailedPrecondition for a folder of the user's that is no base model.
    """
    if isinstance(entry.source, Folder):
        if not (entry.source.path / "config.json").is_file():
            raise FailedPrecondition(
                f"Base model {entry.base!r}: {entry.source.path} holds no config.json.",
                reason="BASE_MODEL_FOLDER_MISSING",
            )
        return entry.source.path
    try:
        target = _target(settings, entry)
    except FailedPrecondition:
        return None
    return target if target.is_dir() else None


def made_folder(settings: Settings, entry: Entry, progress: Progress) -> Path:
    """The folder, converted first if need be; nothing is downloaded.

    Raises FailedPrecondition when the package is missing or damaged, or the hub's files were not pulled.
    """
    folder = ready_folder(settings, entry)
    if folder is not None:
        return folder
    origin = unmade(entry)
    progress(f"Converting {entry.base} to safetensors, once.")
    return make_once(_target(settings, entry), lambda temporary: _convert(origin, temporary))


def unmade(entry: Entry) -> Path:
    """The file that will be converted. Raises FailedPrecondition when there is none."""
    if isinstance(entry.source, Packaged):
        return _packaged_file(entry.base, entry.source)
    raise FailedPrecondition(
        f"Base model {entry.base!r} is on the hub and not here yet. Run `graft models pull {entry.base}`.",
        reason="BASE_MODEL_NOT_PULLED",
    )


def pull(settings: Settings, entry: Entry, *, show_progress: bool = False) -> Path:
    """Downloads a `hub:` entry unless it is there. Raises InvalidArgument for any other kind, and what `hub` raises."""
    source = entry.source
    if not isinstance(source, Hub):
        raise InvalidArgument(
            f"Base model {entry.base!r} is not on the hub ({source_text(entry)}): there is nothing to pull.",
            reason="BASE_MODEL_NOT_ON_HUB",
        )
    target = _target(settings, entry)
    # Kept when a download ends halfway, so that the next goes on from there.
    partial = target.with_name(f".pull-{target.name}")
    return make_once(target, lambda folder: download(entry.base, source, folder, show_progress=show_progress), partial)


def make_once(target: Path, make: Callable[[Path], None], partial: Path | None = None) -> Path:
    """Calls `make` with a folder that becomes `target` when it returns, unless that is there already.

    What a failure left is removed, except in a folder given as `partial`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.with_name(f"{target.name}.lock")):
        if target.is_dir():
            return target
        temporary = partial or Path(tempfile.mkdtemp(dir=target.parent, prefix=".make-"))
        try:
            temporary.mkdir(exist_ok=True)
            make(temporary)
            temporary.chmod(0o755)
            temporary.rename(target)
        except BaseException:
            if partial is None:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
    return target


def _packaged_file(base: str, source: Packaged) -> Path:
    try:
        files = metadata.files(source.package) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == source.file:
            return Path(str(file.locate()))
    raise FailedPrecondition(
        f"Base model {base!r} is in the Python package {source.package}, which is not installed. Run `make setup`.",
        reason="BASE_MODEL_PACKAGE_MISSING",
        metadata={"package": source.package},
    )


def _target(settings: Settings, entry: Entry) -> Path:
    match entry.source:
        case Packaged(package):
            size = _packaged_file(entry.base, entry.source).stat().st_size
            # The size and the package's version name the content well enough to skip hashing 90 MB at every start.
            key = f"{package}-{metadata.version(package)}-{size}"
        case Hub(repository, revision):
            key = f"{repository}@{revision}"
        case Folder(path):
            return path
    return cache_folder(settings) / f"{entry.base}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def _convert(gguf: Path, folder: Path) -> None:
    command = [sys.executable, "-m", "graft.registry.convert", str(gguf), str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if "No space left on device" in ended.stderr:
        raise ResourceExhausted(
            f"The disk of {folder.parent} is full. Free {4 * gguf.stat().st_size // 10**6} MB there, or set "
            "GRAFT_CACHE to a folder on another disk.",
            reason="DISK_FULL",
        )
    if ended.returncode:
        lines = ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"]
        raise FailedPrecondition(
            f"{gguf.name} cannot be converted ({lines[-1]}). If it is damaged, delete .venv and run `make setup`.",
            reason="BASE_MODEL_CONVERSION_FAILED",
        )
