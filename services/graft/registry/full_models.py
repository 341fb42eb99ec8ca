"""A full model that a job made, as a base model of the catalogue: its folder below the home, and its entry.

Owns `base_models/` in GRAFT_HOME as far as deployed models go. Does not fetch a model from MLflow, nor serve it.
"""

import os
import shutil
from pathlib import Path

from graft.domain.deployments import full_model_source
from graft.domain.errors import AlreadyExists
from graft.registry import catalog
from graft.registry.digest import model_digest, model_files
from graft.registry.sources import make_once, source_text
from graft.settings import Settings


def adopt(settings: Settings, base: str, project: str, model: str, license: str, pulled: Path) -> Path:
    """Makes `model` of `project`, whose files are in `pulled`, the project's base model `base`; returns its folder.

    Does nothing when it is already. Files are linked where the disk allows it: the cache that a pull fills may be
    deleted, a base model may not. Raises AlreadyExists when the catalogue has another base model of that name, or its
    folder, though it is no base model, holds another model.
    """
    origin = full_model_source(project, model)
    known = catalog.entries(settings).get(base)
    if known is not None and source_text(known) != origin:
        raise AlreadyExists(
            f"The catalogue has another base model {base!r} ({source_text(known)}). Deploy this one by another name.",
            reason="BASE_MODEL_EXISTS",
            metadata={"name": base},
        )
    folder = settings.home.path / "base_models" / base
    if known is None and folder.is_dir() and not _same(folder, pulled):
        raise AlreadyExists(
            f"{folder} holds another model, though the catalogue does not name it. Remove it, or deploy this one by "
            "another name.",
            reason="BASE_MODEL_EXISTS",
            metadata={"name": base},
        )
    make_once(folder, lambda fresh: _fill(fresh, pulled))
    if known is None:
        content = {"folder": f"base_models/{base}", "license": license, "origin": origin, "project": project}
        try:
            catalog.put(settings, base, content)
        except AlreadyExists:
            # Another process has entered it meanwhile: the same one is no error.
            if source_text(catalog.entry(settings, base)) != origin:
                raise
    return folder


def _same(folder: Path, pulled: Path) -> bool:
    """Whether both hold the same model: the files themselves, where they are links, else their content."""
    try:
        names = [file.name for file in model_files(pulled)]
        if names == [file.name for file in model_files(folder)] and all(
            (folder / name).samefile(pulled / name) for name in names
        ):
            return True
        return model_digest(folder) == model_digest(pulled)
    except FileNotFoundError:
        return False


def _fill(folder: Path, pulled: Path) -> None:
    for file in sorted(pulled.iterdir()):
        if not file.is_file():
            continue
        try:
            os.link(file.resolve(), folder / file.name)
        except OSError:  # another disk, or one without links
            shutil.copy2(file, folder / file.name)
