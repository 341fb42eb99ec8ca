"""Packages that only some graders need, imported when such a grader is built."""

import importlib
from typing import Any

from graft.domain.errors import FailedPrecondition


def needed(name: str) -> Any:
    """The package's module. Raises FailedPrecondition when it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise FailedPrecondition(
            f"This grader needs the package {name.replace('_', '-')}, which cannot be imported here ({error}). "
            "Install graft[grading] where jobs run.",
            reason="PACKAGE_MISSING",
            metadata={"package": name},
        ) from None
