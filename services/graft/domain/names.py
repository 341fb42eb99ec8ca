"""Names: `model` strings, resource names and MLflow's registered model names, parsed and written in one place."""

import re
from dataclasses import dataclass

from graft.domain.errors import FieldViolation, InvalidArgument

DEFAULT_PROJECT = "default"
CHAMPION = "champion"
"""The alias that a name without `@` means."""

HIGHEST_VERSION = 2**31 - 1
"""An int32 of the contract, and an INTEGER of the store."""

ID = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")
"""Projects, base models and adapters: as in DNS labels, plus `.` and `_`. `--` is kept for MLflow's names."""
ALIAS = re.compile(r"[a-z][a-z0-9-]{0,61}")
_RESERVED_ALIAS = re.compile(r"latest|v[0-9]+")


def _invalid(field: str, description: str) -> InvalidArgument:
    return InvalidArgument(
        f"{field}: {description}", reason="INVALID_NAME", violations=(FieldViolation(field, description),)
    )


def check_id(value: str, field: str) -> str:
    """Returns `value` if it is a legal id; raises InvalidArgument naming `field` otherwise."""
    if not ID.fullmatch(value) or "--" in value:
        raise _invalid(
            field,
            f"{value!r} is not a name: use 1 to 63 of a-z, 0-9, '.', '_' and '-', "
            "starting and ending with a letter or digit, without '--'",
        )
    return value


def check_alias(value: str, field: str = "alias") -> str:
    """Returns `value` if it is a legal alias; raises InvalidArgument otherwise (MLflow reserves `latest`, `v1`)."""
    if not ALIAS.fullmatch(value) or _RESERVED_ALIAS.fullmatch(value):
        raise _invalid(field, f"{value!r} is not an alias: [a-z][a-z0-9-]*, and neither 'latest' nor 'v<number>'")
    return value


@dataclass(frozen=True)
class ModelName:
    """A parsed `model`: `base`, `base:adapter`, `base:adapter@3` or `base:adapter@alias`."""

    base: str
    adapter: str | None = None
    version: int | None = None
    alias: str | None = None

    def __str__(self) -> str:
        if self.adapter is None:
            return self.base
        selector = self.version if self.version is not None else self.alias
        return f"{self.base}:{self.adapter}" + (f"@{selector}" if selector is not None else "")


def parse_model(text: str, field: str = "model") -> ModelName:
    """Parses a `model`. An adapter without `@` gets the alias `champion`. Raises InvalidArgument."""
    base, colon, rest = text.partition(":")
    check_id(base, field)
    if not colon:
        if "@" in text:
            raise _invalid(field, f"{text!r}: a base model has no versions; write base:adapter@version")
        return ModelName(base)
    adapter, at, selector = rest.partition("@")
    check_id(adapter, field)
    if not at:
        return ModelName(base, adapter, alias=CHAMPION)
    if selector.isdecimal():
        version = int(selector) if len(selector) <= len(str(HIGHEST_VERSION)) else HIGHEST_VERSION + 1
        if not 1 <= version <= HIGHEST_VERSION:
            raise _invalid(field, f"{text[:80]!r}: versions are numbers from 1 to {HIGHEST_VERSION}")
        return ModelName(base, adapter, version=version)
    return ModelName(base, adapter, alias=check_alias(selector, field))


def parse_resource(name: str, *collections: str, field: str = "name") -> tuple[str, ...]:
    """Splits `projects/p/datasets/d` by `("projects", "datasets")` into `("p", "d")`. Raises InvalidArgument."""
    parts = name.split("/")
    if len(parts) != 2 * len(collections) or tuple(parts[::2]) != collections or not all(parts[1::2]):
        pattern = "/".join(f"{collection}/*" for collection in collections)
        raise _invalid(field, f"{name!r} does not have the form {pattern}")
    return tuple(parts[1::2])


def resource(*pairs: str) -> str:
    """Joins `("projects", "p", "datasets", "d")` into a resource name."""
    return "/".join(pairs)


def dataset_name(project: str, dataset_id: str) -> str:
    """`projects/{project}/datasets/{id}`."""
    return resource("projects", project, "datasets", dataset_id)


def job_name(project: str, job_id: str) -> str:
    """`projects/{project}/fineTuningJobs/{id}`."""
    return resource("projects", project, "fineTuningJobs", job_id)


def registered_model(project: str, base: str, adapter: str) -> str:
    """MLflow's registered model name, which may hold neither `:` nor `/`."""
    return f"{project}--{base}--{adapter}"


def parse_registered_model(name: str) -> tuple[str, str, str] | None:
    """`(project, base, adapter)`, or None for a registered model that is not Graft's."""
    parts = name.split("--")
    if len(parts) != 3 or not all(ID.fullmatch(part) for part in parts):
        return None
    return parts[0], parts[1], parts[2]
