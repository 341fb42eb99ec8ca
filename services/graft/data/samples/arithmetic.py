"""Sums of reasoning-gym's `chain_sum`, with what its scorer judges by."""

from typing import Any

from graft.data.samples.common import Material, split
from graft.domain.errors import FailedPrecondition

CHAIN_SUM = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}
"""Sums that a model of 135 million parameters gets right now and then: without any reward there is nothing to learn."""
_MADE_A_ROW = 4
"""Problems made for each row that is asked for; equal ones are dropped."""


def sums(n_train: int, n_heldout: int, seed: int = 0) -> Material:
    """Graded prompts. No sum is there twice, so that none is on both sides. Needs the package reasoning-gym.

    Raises FailedPrecondition without it, InvalidArgument when too few different sums come up.
    """
    try:
        import reasoning_gym
    except ImportError:
        raise FailedPrecondition(
            "chain_sum needs reasoning-gym. Install it with `pip install 'graft[grading]'`.", reason="PACKAGE_MISSING"
        ) from None
    size = _MADE_A_ROW * (n_train + n_heldout)
    rows: dict[str, dict[str, Any]] = {}
    for entry in reasoning_gym.create_dataset("chain_sum", size=size, seed=seed, **CHAIN_SUM):
        metadata = entry["metadata"]
        prompt = f"{entry['question']}\nAnswer with the number only."
        rows[metadata["expression"]] = {
            "messages": [{"role": "user", "content": prompt}],
            "question": entry["question"],
            "answer": entry["answer"],
            "metadata": {"source_dataset": "chain_sum", "expression": metadata["expression"]},
        }
    train, heldout = split(list(rows.values()), n_train, n_heldout, seed, "different sums")
    return Material(
        name="chain-sum",
        title="Sums of two or three numbers (chain_sum)",
        format="graded_prompts",
        train=tuple(train),
        heldout=tuple(heldout),
        source="reasoning-gym, generated",
        license="Apache-2.0",
    )
