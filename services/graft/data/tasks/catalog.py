"""The tasks that Graft brings. One is a YAML file in `builtin/`; to add one, add a file."""

from functools import lru_cache
from importlib.resources import files

from graft.data.tasks.definition import TaskDefinition, load
from graft.data.tasks.reading import did_you_mean
from graft.domain.errors import InvalidArgument, NotFound

_FOLDER = files("graft.data.tasks") / "builtin"


@lru_cache(maxsize=1)
def names() -> tuple[str, ...]:
    """All of them, in order."""
    return tuple(sorted(file.name.removesuffix(".yaml") for file in _FOLDER.iterdir() if file.name.endswith(".yaml")))


def text(name: str) -> str:
    """The file of a built-in task, with its comments. Raises NotFound naming what exists."""
    if name not in names():
        raise NotFound(
            f"There is no task {name[:80]!r}; {did_you_mean(name[:80], names())}. "
            "Tasks of your own are given as a definition.",
            reason="TASK_NOT_FOUND",
            metadata={"name": name[:80], "existing": ", ".join(names())},
        )
    return (_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


@lru_cache(maxsize=256)
def stored(definition: str) -> TaskDefinition:
    """A definition that was checked before it was stored. Raises InvalidArgument when a newer Graft wrote it."""
    return load(definition)


def name_of(definition: str) -> str:
    """The name of a stored definition; empty without one, and when it cannot be read."""
    try:
        return stored(definition).name if definition else ""
    except InvalidArgument:
        return ""


@lru_cache(maxsize=64)
def builtin(name: str) -> TaskDefinition:
    """A built-in task. Raises NotFound naming what exists."""
    return load(text(name))
