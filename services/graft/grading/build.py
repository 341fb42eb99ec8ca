"""A grader from its specification."""

from graft.domain.errors import InvalidArgument
from graft.domain.grading import GraderSpec, check_grader
from graft.grading.items import Grader
from graft.grading.over_http import HttpGrader
from graft.grading.python_tests import PythonTests
from graft.grading.structure import JsonSchema
from graft.grading.tasks import ReasoningGym
from graft.grading.text import ExactMatch, Numeric, Regex

_GRADERS = {
    "exact_match": ExactMatch,
    "regex": Regex,
    "json_schema": JsonSchema,
    "numeric": Numeric,
    "reasoning_gym": ReasoningGym,
    "python_tests": PythonTests,
    "http": HttpGrader,
}
"""Each takes the settings of `graft.domain.grading.GraderSpec` by name and owns their defaults."""


def build_grader(spec: GraderSpec) -> Grader:
    """The grader, ready: packages imported, the sandbox tried.

    Raises:
        InvalidArgument: the specification is wrong, with every fault in `violations`.
        FailedPrecondition: the grader cannot work in this process: a package or what the sandbox needs is missing.
    """
    violations = tuple(check_grader(spec))
    if violations:
        raise InvalidArgument(
            "The grader is wrong: " + "; ".join(f"{fault.field}: {fault.description}" for fault in violations),
            reason="INVALID_GRADER",
            violations=violations,
        )
    grader: Grader = _GRADERS[spec.kind](**spec.settings)
    return grader
