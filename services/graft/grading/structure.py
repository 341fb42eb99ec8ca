"""The grader of structured answers: JSON against a schema."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from graft.domain.errors import InvalidArgument
from graft.grading.fences import first_fence
from graft.grading.items import Grade, GradeItem, verdict
from graft.grading.packages import needed
from graft.grading.text import SEARCH_TIMEOUT_SECONDS, Search


class JsonSchema:
    """The completion's JSON satisfies a schema, of the draft that its `$schema` names or else 2020-12.

    `pattern` is searched with a limit of time. `$ref` reaches within the schema only.

    Raises:
        InvalidArgument: the schema itself is wrong.
    """

    def __init__(self, schema: dict[str, Any]) -> None:
        jsonschema = needed("jsonschema")
        kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        try:
            kind.check_schema(schema)
        except jsonschema.SchemaError as error:
            raise InvalidArgument(
                f"The grader's schema is wrong at {error.json_path}: {error.message}", reason="INVALID_GRADER"
            ) from None
        bounded = jsonschema.validators.extend(kind, {"pattern": _pattern})
        # An empty registry: the default one fetches what `$ref` names from the network.
        self._validator = bounded(schema, registry=needed("referencing").Registry())
        self._unresolvable = needed("referencing.exceptions").Unresolvable

    def grade(self, items: Sequence[GradeItem]) -> list[Grade]:
        """1 where the JSON is there and satisfies the schema, else 0."""
        return [self._grade(item.completion) for item in items]

    def _grade(self, completion: str) -> Grade:
        fence = first_fence(completion, "json")
        try:
            value = json.loads(completion if fence is None else fence, parse_constant=_no_constant)
            fault = next(self._validator.iter_errors(value), None)
        except TimeoutError:
            return verdict(False, "a pattern of the schema took too long")
        except self._unresolvable as error:
            raise InvalidArgument(
                f"The grader's schema refers to {error.ref!r}, which is not in it. Put it below $defs.",
                reason="INVALID_GRADER",
            ) from None
        except RecursionError:
            return verdict(False, "the JSON is nested too deeply")
        except ValueError as error:
            return verdict(False, f"not JSON: {error}")
        if fault is not None:
            return verdict(False, f"{fault.json_path}: {fault.message}")
        return verdict(True, "satisfies the schema")


def _pattern(_: Any, pattern: str, instance: Any, __: Any) -> Iterator[Any]:
    if isinstance(instance, str) and Search(pattern, SEARCH_TIMEOUT_SECONDS).first(instance) is None:
        yield needed("jsonschema").ValidationError(f"{instance!r} does not match {pattern!r}")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
