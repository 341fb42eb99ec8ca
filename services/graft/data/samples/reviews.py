"""Sentences of film reviews with their critic's verdict, from a package that set-up fetched."""

import io
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from graft.data.samples.common import Row, Sample, chat_row, shuffled, split, text_key
from graft.domain.errors import FailedPrecondition

REVIEWS_ARCHIVE = Path(sys.prefix) / "share" / "graft" / "vaderSentiment-3.3.2.tar.gz"
"""Where `deploy/setup/fetch.py` puts it."""
_INNER_ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
_INNER_FILE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
_LAST_POSITIVE, _LAST_NEGATIVE = 5152, 10312
"""Rows to 5152 are of reviews that their critics call fresh, those to 10312 of rotten ones; the rest is unlabelled."""


def reviews(n_train: int, n_heldout: int, seed: int = 0, archive: Path = REVIEWS_ARCHIVE) -> Sample:
    """Sentences of film reviews (Hutto and Gilbert, ICWSM 2014), labelled by their critic, as many of each label.

    The same numbers and seed give the same rows everywhere; held-out rows do not depend on `n_train`. Raises
    FailedPrecondition when the archive is missing or not the expected one, InvalidArgument when it has fewer rows.
    """
    labels = ("positive", "negative")
    by_label: dict[str, dict[str, str]] = {label: {} for label in labels}
    for number, text in _review_lines(archive):
        if number <= _LAST_NEGATIVE:
            by_label["positive" if number <= _LAST_POSITIVE else "negative"].setdefault(text_key(text), text)
    disputed = by_label["positive"].keys() & by_label["negative"].keys()
    train: list[Row] = []
    heldout: list[Row] = []
    for index, label in enumerate(labels):
        rows = [
            chat_row("Is this film review positive or negative? Answer with one word.", text, label)
            for key, text in by_label[label].items()
            if key not in disputed
        ]
        # An odd number gives its last row to the first label.
        mine, others = split(rows, (n_train + 1 - index) // 2, (n_heldout + 1 - index) // 2, seed, f"{label} reviews")
        train += mine
        heldout += others
    return Sample(
        name="reviews",
        title="Sentiment of film reviews",
        train=tuple(shuffled(train, seed)),
        heldout=tuple(shuffled(heldout, seed)),
        labels=labels,
        source="vaderSentiment 3.3.2, movieReviewSnippets",
        license="MIT",
    )


def _review_lines(archive: Path) -> Iterator[tuple[int, str]]:
    if not archive.is_file():
        raise FailedPrecondition(
            f"The film reviews are missing: {archive} does not exist. Run `make setup`.", reason="SAMPLE_MISSING"
        )
    try:
        lines = _member(_member(archive.read_bytes(), _INNER_ARCHIVE), _INNER_FILE).decode().splitlines()
    except (tarfile.TarError, KeyError, UnicodeDecodeError, OSError, EOFError) as error:
        raise FailedPrecondition(
            f"{archive} cannot be read ({error}). Delete it and run `make setup`.", reason="SAMPLE_DAMAGED"
        ) from error
    for line in lines:
        number, _rating, text = line.split("\t", 2)
        yield int(number), text.strip()


def _member(archive: bytes, path: str) -> bytes:
    """A file's content, read without unpacking anything to disk. Raises KeyError when it is not there."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        for member in files:
            if member.name.endswith(path) and (content := files.extractfile(member)) is not None:
                return content.read()
    raise KeyError(path)
