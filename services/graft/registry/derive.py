"""`graft models derive`: a smaller base model from one of the catalogue, in a process of its own, and its entry.

Owns the folders below `base_models` in GRAFT_HOME. How it is made is `graft.training.healing`'s.
"""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft import offline
from graft.child import OnReport, run
from graft.domain.errors import KINDS, AlreadyExists, Internal, InvalidArgument
from graft.registry import catalog
from graft.registry.base_models import ensure_base_model
from graft.registry.facts import LINEAGE, read_facts
from graft.registry.locks import locked, locked_if_free
from graft.registry.sources import cache_folder
from graft.settings import Settings


@dataclass(frozen=True)
class Request:
    """What the user asks for."""

    base: str
    name: str
    layers: int
    """Blocks to keep."""
    text: Path | None = None
    """None: documentation that every Python carries."""
    tokens: int = 0
    """Most tokens to heal with; 0 for as many as the time allows."""
    max_minutes: float = 10.0
    """Longest healing; loading and measuring come on top."""
    choose: str = "angle"


def derive(settings: Settings, request: Request, on_report: OnReport) -> dict[str, Any]:
    """Makes the model, enters it into the catalogue and returns its lineage. Left early, it leaves nothing.

    Raises InvalidArgument or AlreadyExists before anything starts, and what the process reports as its failure.
    """
    catalog.check_free(settings, request.name)
    place = settings.home.path / "base_models"
    target = place / request.name
    if target.exists():
        raise AlreadyExists(
            f"{target} is there already, though the catalogue does not name it. Remove it, or take another --name.",
            reason="BASE_MODEL_EXISTS",
        )
    if request.text is not None and not request.text.is_file():
        raise InvalidArgument(f"{request.text} is not a file.", reason="TEXT_UNREADABLE")
    base = ensure_base_model(settings, request.base, lambda text: on_report({"kind": "phase", "message": text}))
    blocks = read_facts(base.id, Path(base.path), cache_folder(settings)).layers
    if not 2 <= request.layers < blocks:
        raise InvalidArgument(
            f"{base.id} has {blocks} layers: --layers must be from 2 to {blocks - 1}, and is {request.layers}.",
            reason="LAYERS_OUT_OF_RANGE",
        )
    with _fresh_folder(place) as folder:
        lineage = _run(
            {
                "base": base.id,
                "base_digest": base.digest,
                "base_folder": base.path,
                "output": str(folder),
                "layers": request.layers,
                "choose": request.choose,
                "text": str(request.text.absolute()) if request.text else "",
                "tokens": request.tokens,
                "seconds": request.max_minutes * 60,
            },
            on_report,
        )
        (folder / LINEAGE).write_text(json.dumps(lineage | {"license": base.license}, indent=1))
        _readable(folder)
        folder.rename(target)
    try:
        catalog.put(
            settings,
            request.name,
            {
                "folder": str(target.relative_to(settings.home.path)),
                "license": base.license,
                "derived": {"from": base.id, "layers": request.layers},
            },
        )
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    return lineage


@contextlib.contextmanager
def _fresh_folder(place: Path) -> Iterator[Path]:
    """An empty folder below `place`, removed at the end unless it was renamed; and with it what others left there."""
    place.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        with locked(place):  # or it could be swept between its making and its lock
            for left in place.glob(".derive-*"):
                with locked_if_free(left) as free:
                    if free:
                        shutil.rmtree(left, ignore_errors=True)
            folder = Path(tempfile.mkdtemp(dir=place, prefix=".derive-"))
            held.callback(shutil.rmtree, folder, ignore_errors=True)
            held.enter_context(locked(folder))
        yield folder


def _readable(folder: Path) -> None:
    """For whoever may read the home: temporary folders, and what safetensors writes, are their owner's alone."""
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.chmod(0o644)


def _run(order: dict[str, Any], on_report: OnReport) -> dict[str, Any]:
    ended = run("graft.training.healing", order, on_report, offline.ENVIRONMENT)
    report = ended.report
    if report["kind"] == "finished":
        lineage: dict[str, Any] = report["lineage"]
        return lineage
    if report["kind"] == "failed":
        raise KINDS[report["code"]](report["message"], reason=report["reason"])
    raise Internal(f"Deriving failed: {ended.cause}.", reason="DERIVE_FAILED")
