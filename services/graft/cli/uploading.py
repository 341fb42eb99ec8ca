"""The data sets that commands are given: ids, or files that are uploaded first."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graft.cli.output import short_id

if TYPE_CHECKING:
    from graft.client import Graft

Format = Annotated[
    str,
    typer.Option(
        metavar="FORMAT",
        help="How to read rows that may be read in several ways: messages, prompt_completion, text, question_answer, "
        "alpaca, sharegpt, preference, openai_preference, graded_prompts or fields. Recognised when not given.",
    ),
]


def uploaded(graft: "Graft", dataset: str, format: str = "", *, as_json: bool) -> str:
    """The id of a data set. A file of that name, where there is one, is uploaded first, as `format`.

    People are told the id: what comes next may be refused, and the file need not be sent again then.
    """
    if not Path(dataset).is_file():
        return dataset
    made = short_id(graft.upload_dataset(dataset, format=format).name)
    if not as_json:
        print(f"{dataset} is uploaded as data set {made}.", flush=True)
    return made
