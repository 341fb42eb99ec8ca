"""Real tasks for demonstrations, showcases and benchmarks, read from packages that were fetched; nothing is vendored.

One module a source. Each owns its rows, labels and prompts, and a split in which no held-out row is trained on; none
knows models or metrics (`graft.evaluation`), nor how a package is fetched.
"""

from graft.data.samples.arithmetic import sums
from graft.data.samples.boolq import boolq
from graft.data.samples.common import (
    Material,
    Message,
    Row,
    Sample,
    answer,
    choose_shots,
    few_shot,
    text_key,
    write_rows,
    zero_shot,
)
from graft.data.samples.descriptions import descriptions
from graft.data.samples.docstrings import MAX_SOURCE_CHARACTERS, docstrings, functions
from graft.data.samples.jargon import jargon
from graft.data.samples.natural_questions import preferred_answers
from graft.data.samples.reviews import REVIEWS_ARCHIVE, reviews

__all__ = [
    "MAX_SOURCE_CHARACTERS",
    "REVIEWS_ARCHIVE",
    "Material",
    "Message",
    "Row",
    "Sample",
    "answer",
    "boolq",
    "choose_shots",
    "descriptions",
    "docstrings",
    "few_shot",
    "functions",
    "jargon",
    "preferred_answers",
    "reviews",
    "sums",
    "text_key",
    "write_rows",
    "zero_shot",
]
