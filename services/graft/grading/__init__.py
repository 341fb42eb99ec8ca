"""Graders: a prompt's row and a completion become a reward. Kinds and settings: `graft.domain.grading`."""

from graft.grading.build import build_grader
from graft.grading.items import Grade, GradeItem, Grader

__all__ = ["Grade", "GradeItem", "Grader", "build_grader"]
