"""The catalogue's entries: what comes with Graft, and what files in GRAFT_HOME add or replace: `catalog.yaml`, which is
given, and `base_models.yaml`, to which entries are added.

Owns the latter and the form of all. Does not know whether what an entry names is there (`graft.registry.sources`).
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from graft.domain.errors import AlreadyExists, FieldViolation, GraftError, InvalidArgument, unknown
from graft.domain.names import check_id
from graft.registry.locks import locked
from graft.settings import Settings

UNKNOWN = "unknown"
"""The licence of an entry that tells none."""
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
_KINDS = {
    "folder": {"folder", "license", "derived", "origin", "project"},
    "package": {"package", "file", "license"},
    "hub": {"hub", "revision", "license"},
}
"""The key that tells an entry's kind, and all that an entry of that kind may have."""
_DERIVED = {"from": str, "layers": int}


@dataclass(frozen=True)
class Folder:
    """A Hugging Face folder in safetensors on this machine."""

    path: Path
    derived_from: str = ""
    """The base model that `graft models derive` made it from; empty for any other."""
    layers: int = 0
    """Blocks that were kept."""
    origin: str = ""
    """Which full model it is, of one that a job made and that was deployed; empty for any other."""
    project: str = ""
    """The project whose job that was, which alone may use it; empty for any other."""


@dataclass(frozen=True)
class Packaged:
    """A GGUF file in an installed Python package."""

    package: str
    file: str


@dataclass(frozen=True)
class Hub:
    """A repository of the Hugging Face hub."""

    repository: str
    revision: str = "main"
    """Branch, tag or commit."""


Source: TypeAlias = Folder | Packaged | Hub


@dataclass(frozen=True)
class Entry:
    """One base model of the catalogue."""

    base: str
    source: Source
    license: str
    """SPDX id, or UNKNOWN."""


def given_file(settings: Settings) -> Path:
    """`catalog.yaml` of this home, there or not: whoever runs the stack writes it, Graft only reads it."""
    return settings.home.path / "catalog.yaml"


def own_file(settings: Settings) -> Path:
    """`base_models.yaml` of this home, there or not, to which `put` adds."""
    return settings.home.path / "base_models.yaml"


def entries(settings: Settings) -> dict[str, Entry]:
    """Every entry, by id. Raises InvalidArgument INVALID_CATALOG that names each file, entry and key at fault."""
    shipped = resources.files("graft.registry") / "catalog.yaml"
    found = _parse(shipped.read_text(), Path(str(shipped)))
    for file in (given_file(settings), own_file(settings)):
        found |= _parse(_text(file), file)
    return dict(sorted(found.items()))


def entry(settings: Settings, base: str) -> Entry:
    """One of them. Raises NotFound that names the others."""
    known = entries(settings)
    if base not in known:
        raise unknown("base model", base, sorted(known))
    return known[base]


def put(settings: Settings, base: str, content: Mapping[str, Any]) -> Entry:
    """Adds an entry at the end of the home's own file, in one step; what is there stays as it was written.

    Raises AlreadyExists for a name that is taken, InvalidArgument for an entry that `entries` would refuse.
    """
    own = own_file(settings)
    own.parent.mkdir(parents=True, exist_ok=True)
    with locked(own.with_name(f".{own.name}.lock")):
        check_free(settings, base)
        changed = _appended(_text(own), base, dict(content))
        made = _parse(changed, own)[base]
        fresh = own.with_name(f".{own.name}.{os.getpid()}")
        fresh.write_text(changed)
        fresh.replace(own)
    return made


def check_free(settings: Settings, base: str) -> None:
    """Raises AlreadyExists for a name that is taken, InvalidArgument for one that cannot be one."""
    check_id(base, "name")
    if base in entries(settings):
        raise AlreadyExists(
            f"The catalogue has a base model {base!r} already. Take another name, or remove it from "
            f"{own_file(settings)}.",
            reason="BASE_MODEL_EXISTS",
        )


def _text(file: Path) -> str:
    """Empty when there is no file."""
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError as error:
        raise InvalidArgument(
            f"{file} is not UTF-8 text (byte {error.start}). Save it as UTF-8.", reason="INVALID_CATALOG"
        ) from None
    except OSError as error:
        raise InvalidArgument(f"{file} cannot be read: {error.strerror}.", reason="INVALID_CATALOG") from None


def _appended(text: str, base: str, content: dict[str, Any]) -> str:
    """`text` with one more entry. Written anew, without comments, only where a line at its end would not be one."""
    line = yaml.safe_dump({base: content}, default_flow_style=None, sort_keys=True, width=10_000)
    changed = text + "\n" * (text != "" and not text.endswith("\n")) + line
    whole = (yaml.safe_load(text) or {}) | {base: content}
    try:
        if yaml.safe_load(changed) == whole:
            return changed
    except yaml.YAMLError:
        pass
    return yaml.safe_dump(whole, sort_keys=True)


class _Loader(yaml.SafeLoader):
    """PyYAML lets the last of two equal keys win, silently."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.value in seen:
            raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
        seen.add(str(key.value))
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _parse(text: str, file: Path) -> dict[str, Entry]:
    try:
        content = yaml.load(text, _Loader) or {}
    except (yaml.YAMLError, ValueError) as error:  # such as the 31st of February
        raise InvalidArgument(f"{file} is not YAML: {error}", reason="INVALID_CATALOG") from None
    if not isinstance(content, dict):
        raise InvalidArgument(f"{file}: expected a mapping of names to entries.", reason="INVALID_CATALOG")
    faults: list[FieldViolation] = []
    found = {}
    for base, fields in content.items():
        wrong = list(_faults(base, fields))
        faults += [FieldViolation(f"{base}.{key}" if key else str(base), told) for key, told in wrong]
        if not wrong:
            found[base] = Entry(base, _source(fields, file.parent), fields.get("license", UNKNOWN))
    if faults:
        told = "; ".join(f"{fault.field}: {fault.description}" for fault in faults)
        raise InvalidArgument(f"{file}: {told}.", reason="INVALID_CATALOG", violations=tuple(faults))
    return found


def _faults(base: object, fields: object) -> Iterator[tuple[str, str]]:
    """Each key at fault, or the empty string for the entry itself, and what is wrong with it."""
    if isinstance(base, str):
        try:
            check_id(base, "name")
        except GraftError as error:
            yield "", error.violations[0].description
    else:
        yield "", "a name must be text: put it in quotes"
    if not isinstance(fields, dict):
        yield "", "expected keys such as `folder: /models/mine`"
        return
    kinds = _KINDS.keys() & fields.keys()
    if len(kinds) != 1:
        yield (
            "",
            f"needs exactly one of {', '.join(_KINDS)}" + (f", and has {' and '.join(sorted(kinds))}" * bool(kinds)),
        )
        return
    (kind,) = kinds
    for key, value in fields.items():
        if key not in _KINDS[kind]:
            yield str(key), f"is unknown; a `{kind}` entry has {', '.join(sorted(_KINDS[kind]))}"
        elif key == "derived":
            if not isinstance(value, dict) or {name: type(each) for name, each in value.items()} != _DERIVED:
                yield key, "needs `from`, a base model's name, and `layers`, a number, and nothing else"
        elif not isinstance(value, str) or not value.strip():
            yield key, f"must be text, and is {value!r}"
    if kind == "package" and "file" not in fields:
        yield "file", "is required: the name of the GGUF file in the package"
    if kind == "hub" and isinstance(fields["hub"], str) and not _HUB_NAME.fullmatch(fields["hub"]):
        yield "hub", f"must be a repository such as org/name, and is {fields['hub']!r}"


def _source(fields: Mapping[str, Any], home: Path) -> Source:
    if "package" in fields:
        return Packaged(fields["package"], fields["file"])
    if "hub" in fields:
        return Hub(fields["hub"], fields.get("revision", "main"))
    derived = fields.get("derived", {})
    # A path without a root is one below the home, so that a home can be moved.
    return Folder(
        home / Path(fields["folder"]).expanduser(),
        derived.get("from", ""),
        derived.get("layers", 0),
        fields.get("origin", ""),
        fields.get("project", ""),
    )
