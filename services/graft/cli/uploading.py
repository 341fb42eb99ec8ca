"""The data sets that commands are given: ids, or files and URLs that are uploaded first."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graft.cli.bar import Bar
from graft.cli.output import short_id
from graft.domain.errors import FieldViolation, InvalidArgument

if TYPE_CHECKING:
    from graft.api.v1.dataset_pb2 import Dataset
    from graft.client import Graft

Format = Annotated[
    str,
    typer.Option(
        metavar="FORMAT",
        help="How to read rows that may be read in several ways: messages, prompt_completion, text, question_answer, "
        "alpaca, sharegpt, preference, openai_preference, graded_prompts or fields. Recognised when not given.",
    ),
]


def upload(graft: "Graft", source: str, name: str = "", *, format: str = "") -> "Dataset":
    """Uploads a file or what an fsspec URL names; a terminal is shown how far it is."""
    with Bar() as bar:
        file = Path(source)
        bar.begin(f"Uploading {file.name}", file.stat().st_size if file.is_file() else None)
        return graft.upload_dataset(source, name, format=format, progress=bar.at)


def uploaded(graft: "Graft", dataset: str, format: str = "", *, as_json: bool) -> str:
    """The id of a data set. A file of that name, where there is one, and an fsspec URL are uploaded first, as `format`.

    People are told the id: what comes next may be refused, and the file need not be sent again then. Raises
    InvalidArgument for what can only be a file, and is not there.
    """
    if "://" not in dataset and not Path(dataset).is_file():
        if Path(dataset).suffix or ("/" in dataset and not dataset.startswith("projects/")):
            raise InvalidArgument(
                f"{dataset} is neither a file here nor the id of a data set, as `graft datasets list` shows it.",
                reason="UNREADABLE_FILE",
                violations=(FieldViolation("path", dataset),),
            )
        return dataset
    made = short_id(upload(graft, dataset, format=format).name)
    if not as_json:
        print(f"{dataset} is uploaded as data set {made}.", flush=True)
    return made
