"""The catalogue of base models: what is known of each, and its folder, converted once from a packaged file if need be.

Owns the folders below `cache/base_models`. Conversion has a process of its own (`graft.registry.convert`).
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import yaml

from graft.domain.errors import FailedPrecondition, InvalidArgument, ResourceExhausted, unknown
from graft.domain.names import check_id
from graft.domain.resources import BaseModel
from graft.settings import Settings

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a llama block: LoRA's `all-linear`."""
ARCHITECTURES = ("LlamaForCausalLM",)
"""Those whose layer names are known to be LINEAR's and that the tests train and serve."""
_FACTS = "graft-model.json"
_HASHED = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

Progress = Callable[[str], None]


def load_catalog(settings: Settings) -> list[BaseModel]:
    """The base models whose folders are ready, by id; a packaged one appears once it was converted."""
    entries = _entries(settings)
    found = [(base, _ready_folder(settings, base, entry), entry) for base, entry in sorted(entries.items())]
    return [_describe(settings, base, folder, entry) for base, folder, entry in found if folder is not None]


def ensure_base_model(settings: Settings, base_id: str, progress: Progress = lambda _: None) -> BaseModel:
    """The base model, converted first if it is not yet.

    Raises NotFound for one that is not in the catalogue, FailedPrecondition when its package is missing.
    """
    entries = _entries(settings)
    if base_id not in entries:
        raise unknown("base model", base_id, sorted(entries))
    entry = entries[base_id]
    folder = _ready_folder(settings, base_id, entry)
    if folder is None:
        progress(f"Converting {base_id} to safetensors, once.")
        folder = _convert_once(_target(settings, base_id, entry), _packaged_file(base_id, entry))
    return _describe(settings, base_id, folder, entry)


def base_model_source(settings: Settings, base_id: str) -> Path:
    """The base model's folder or, before its conversion, the packaged file. Converts nothing.

    Raises NotFound for one that is not in the catalogue, FailedPrecondition when its folder or package is missing.
    """
    entries = _entries(settings)
    if base_id not in entries:
        raise unknown("base model", base_id, sorted(entries))
    entry = entries[base_id]
    return _ready_folder(settings, base_id, entry) or _packaged_file(base_id, entry)


def _entries(settings: Settings) -> dict[str, dict[str, str]]:
    entries = dict(yaml.safe_load((resources.files("graft.registry") / "catalog.yaml").read_text()))
    own = settings.home.path / "base_models.yaml"
    if own.is_file():
        entries |= yaml.safe_load(own.read_text()) or {}
    for base, entry in entries.items():
        check_id(base, "base model")
        if not isinstance(entry, dict) or not ({"folder"} <= entry.keys() or {"package", "file"} <= entry.keys()):
            raise InvalidArgument(
                f"Base model {base!r} in {own} needs `folder`, or `package` and `file`.", reason="INVALID_CATALOG"
            )
    return entries


def _packaged_file(base: str, entry: dict[str, str]) -> Path:
    package = entry["package"]
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == entry["file"]:
            return Path(str(file.locate()))
    raise FailedPrecondition(
        f"Base model {base!r} is in the Python package {package}, which is not installed. Run `make setup`.",
        reason="BASE_MODEL_PACKAGE_MISSING",
        metadata={"package": package},
    )


def _target(settings: Settings, base: str, entry: dict[str, str]) -> Path:
    source = _packaged_file(base, entry)
    # The size and the package's version name the content well enough to skip hashing 90 MB at every start.
    key = f"{entry['package']}-{metadata.version(entry['package'])}-{source.stat().st_size}"
    return settings.home.cache / "base_models" / f"{base}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def _ready_folder(settings: Settings, base: str, entry: dict[str, str]) -> Path | None:
    if "folder" in entry:
        folder = Path(entry["folder"]).expanduser()
        if not (folder / "config.json").is_file():
            raise FailedPrecondition(
                f"Base model {base!r}: {folder} holds no config.json.", reason="BASE_MODEL_FOLDER_MISSING"
            )
        return folder
    try:
        target = _target(settings, base, entry)
    except FailedPrecondition:
        return None
    return target if target.is_dir() else None


def _convert_once(target: Path, gguf: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_suffix(".lock")):
        if target.is_dir():
            return target
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=".convert-"))
        try:
            _convert(gguf, temporary)
            temporary.chmod(0o755)
            temporary.rename(target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return target


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


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


def _describe(settings: Settings, base: str, folder: Path, entry: dict[str, str]) -> BaseModel:
    config = json.loads((folder / "config.json").read_text())
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture not in ARCHITECTURES:
        raise FailedPrecondition(
            f"Base model {base!r} is a {architecture}; supported: {', '.join(ARCHITECTURES)}.",
            reason="UNSUPPORTED_ARCHITECTURE",
        )
    facts = _facts(folder, settings.home.cache / "base_models")
    return BaseModel(
        id=base,
        path=str(folder),
        digest=facts["digest"],
        parameter_count=facts["parameter_count"],
        size_bytes=facts["size_bytes"],
        context_tokens=min(int(config["max_position_embeddings"]), settings.serving.context_tokens),
        license=entry.get("license", "unknown"),
        source=f"package {entry['package']}" if "package" in entry else "folder",
        target_modules=LINEAR,
        max_lora_rank=settings.serving.max_lora_rank,
    )


def _facts(folder: Path, cache: Path) -> dict[str, Any]:
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise FailedPrecondition(f"{folder} holds no safetensors file.", reason="BASE_MODEL_WEIGHTS_MISSING")
    files = [folder / name for name in _HASHED if (folder / name).is_file()] + weights
    stamps = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    # Hashing takes a second a gigabyte, so it is kept beside the cache, never in a folder of the user's.
    kept = cache / f"{hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]}-{_FACTS}"
    if kept.is_file():
        known: dict[str, Any] = json.loads(kept.read_text())
        if known["stamps"] == stamps:
            return known
    total = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            total.update(f"{path.name}\n{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    facts = {
        "stamps": stamps,
        "digest": f"sha256:{total.hexdigest()}",
        "parameter_count": sum(_parameter_count(path) for path in weights),
        "size_bytes": sum(path.stat().st_size for path in weights),
    }
    cache.mkdir(parents=True, exist_ok=True)
    fresh = kept.with_suffix(f".{os.getpid()}")
    fresh.write_text(json.dumps(facts))
    fresh.replace(kept)
    return facts


def _parameter_count(path: Path) -> int:
    """From the header alone: 8 bytes of length, then JSON (the safetensors format)."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    count = 0
    for name, tensor in header.items():
        if name != "__metadata__":
            size = 1
            for dimension in tensor["shape"]:
                size *= dimension
            count += size
    return count
