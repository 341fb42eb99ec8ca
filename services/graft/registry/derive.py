"""`graft models derive`: a smaller base model from one of the catalogue, in a process of its own, and its entry.

Owns the folders below `base_models` in GRAFT_HOME. How it is made is `graft.training.healing`'s.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from graft import offline
from graft.domain.errors import KINDS, AlreadyExists, Internal, InvalidArgument
from graft.domain.names import check_id
from graft.registry import catalog
from graft.registry.base_models import ensure_base_model
from graft.registry.facts import LINEAGE, read_facts
from graft.registry.sources import cache_folder
from graft.settings import Settings

END_SECONDS = 10.0
"""How long the process has to end when it is told to."""

OnReport = Callable[[dict[str, Any]], None]


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
    check_id(request.name, "name")
    if request.name in catalog.entries(settings):
        raise AlreadyExists(
            f"The catalogue has a base model {request.name!r} already. Take another --name.", reason="BASE_MODEL_EXISTS"
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
    place = settings.home.path / "base_models"
    place.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=place, prefix=".derive-"))
    target = place / request.name
    try:
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
        folder.chmod(0o755)
        if target.exists():
            raise AlreadyExists(f"{target} is there already. Remove it.", reason="BASE_MODEL_EXISTS")
        folder.rename(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
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


def _run(order: dict[str, Any], on_report: OnReport) -> dict[str, Any]:
    """Runs the process to its end, whatever ends this one's wait."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "graft.training.healing"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            # Ctrl-C is for the command alone, which then ends the process; in one group both would hear it.
            start_new_session=True,
            env={**os.environ, **offline.ENVIRONMENT},
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(order))
            process.stdin.close()
            report = _follow(process.stdout, on_report)
            process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(END_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        if report["kind"] == "finished":
            lineage: dict[str, Any] = report["lineage"]
            return lineage
        if report["kind"] == "failed" and report["reason"] != "TRAINING_FAILED":
            raise KINDS[report["code"]](report["message"], reason=report["reason"])
        raise Internal(f"Deriving failed (exit code {process.returncode}): {_end(log)}", reason="DERIVE_FAILED")


def _follow(lines: IO[str], on_report: OnReport) -> dict[str, Any]:
    """Passes reports on; returns the last."""
    report: dict[str, Any] = {"kind": "nothing"}
    for line in lines:
        report = json.loads(line)
        on_report(report)
    return report


def _end(log: IO[bytes]) -> str:
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing, and was most likely ended for memory."
