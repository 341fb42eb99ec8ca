"""The catalogue of base models as the other parts see it: which are ready, and the folder and facts of each.

Entries are read in `graft.registry.catalog`, their folders found and made in `graft.registry.sources`.
"""

from collections.abc import Callable
from pathlib import Path

from graft.domain.errors import GraftError
from graft.domain.resources import BaseModel
from graft.registry.catalog import UNKNOWN, Entry, Folder, entries, entry, given_file, own_file
from graft.registry.facts import LINEAR, read_facts, read_lineage
from graft.registry.sources import Progress, cache_folder, made_folder, ready_folder, source_text, unmade
from graft.settings import Settings

OnFault = Callable[[str, GraftError], None]


def load_catalog(settings: Settings, on_fault: OnFault | None = None) -> list[BaseModel]:
    """The base models whose folders are ready, by id; the others appear once they were converted or pulled.

    `on_fault` is told of each whose folder is at fault, by its id, and the rest is returned all the same; without it
    the first fault is raised. Raises InvalidArgument when the catalogue itself cannot be read.
    """
    found = []
    for base, one in entries(settings).items():
        try:
            folder = ready_folder(settings, one)
            if folder is not None:
                found.append(_describe(settings, one, folder))
        except GraftError as error:
            if on_fault is None:
                raise
            on_fault(base, error)
    return found


def ensure_base_model(settings: Settings, base_id: str, progress: Progress = lambda _: None) -> BaseModel:
    """The base model, converted first if it is not yet.

    Raises NotFound for one that is not in the catalogue, FailedPrecondition when its package is missing.
    """
    one = entry(settings, base_id)
    return _describe(settings, one, made_folder(settings, one, progress))


def base_model_source(settings: Settings, base_id: str) -> Path:
    """The base model's folder or, before its conversion, the packaged file. Converts nothing.

    Raises NotFound for one that is not in the catalogue, FailedPrecondition when its folder or package is missing.
    """
    one = entry(settings, base_id)
    return ready_folder(settings, one) or unmade(one)


def catalog_stamp(settings: Settings) -> tuple[int, ...]:
    """Changes when an entry does, and when a folder was made or filled: time to call `load_catalog` again.

    Raises InvalidArgument when the catalogue cannot be read.
    """
    stamp = []
    folders = [one.source.path for one in entries(settings).values() if isinstance(one.source, Folder)]
    files = given_file(settings), own_file(settings), *(each / "config.json" for each in folders)
    for path in (*files, cache_folder(settings), *folders):
        try:
            found = path.stat()
        except OSError:  # not there, or below a file
            stamp += [0, 0]
        else:
            stamp += [found.st_mtime_ns, found.st_ino]  # a file that was replaced has another inode
    return tuple(stamp)


def known_license(one: Entry, folder: Path) -> str:
    """The entry's licence or, where it tells none, that of the folder's origin."""
    return one.license if one.license != UNKNOWN else str(read_lineage(folder).get("license") or UNKNOWN)


def _describe(settings: Settings, one: Entry, folder: Path) -> BaseModel:
    facts = read_facts(one.base, folder, cache_folder(settings))
    return BaseModel(
        id=one.base,
        path=str(folder),
        digest=facts.digest,
        parameter_count=facts.parameter_count,
        size_bytes=facts.size_bytes,
        context_tokens=min(facts.context_tokens, settings.serving.context_tokens),
        license=known_license(one, folder),
        source=source_text(one),
        target_modules=LINEAR,
        max_lora_rank=settings.serving.max_lora_rank,
        project=one.source.project if isinstance(one.source, Folder) else "",
        shape=facts.shape,
    )
