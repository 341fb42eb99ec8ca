from itertools import chain

import pytest

from graft.data.prepare import Example
from graft.training.batching import batches, microbatches, pack, share


def _example(length: int, learned: int = 1) -> Example:
    return Example(list(range(length)), [False] * (length - learned) + [True] * learned)


def test_every_epoch_sees_every_example_once_in_another_order() -> None:
    steps = list(batches(12, 4, 6, seed=0))
    first, second = list(chain(*steps[:3])), list(chain(*steps[3:]))
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second
    assert list(batches(12, 4, 6, seed=0)) == steps
    assert list(batches(12, 4, 6, seed=1)) != steps


def test_the_last_batch_of_an_epoch_may_be_smaller_and_the_steps_may_end_within_one() -> None:
    assert [len(step) for step in batches(10, 4, 5, seed=0)] == [4, 4, 2, 4, 4]


@pytest.mark.parametrize("workers", [1, 2, 3, 9])
def test_workers_share_a_batch_without_loss_and_about_evenly(workers: int) -> None:
    batch = [_example(length) for length in (100, 90, 50, 45, 30, 9, 3, 2)]
    shares = [share(batch, rank, workers) for rank in range(workers)]
    assert sorted(len(e.token_ids) for e in chain(*shares)) == [2, 3, 9, 30, 45, 50, 90, 100]
    tokens = [sum(len(e.token_ids) for e in part) for part in shares]
    assert max(tokens) <= max(100, sum(tokens) / workers + 50)


def test_microbatches_hold_every_example_once_within_the_token_budget() -> None:
    groups = list(microbatches([_example(length) for length in (3000, 700, 700, 10, 900)], most_tokens=1000))
    assert [group.lengths for group in groups] == [(10, 700), (700,), (900,), (3000,)]


def test_a_packed_row_says_where_each_learned_token_is_predicted() -> None:
    packed = pack([Example([7, 8], [False, True]), Example([1, 2, 3], [True, False, True])])
    assert packed.token_ids_N.tolist() == [7, 8, 1, 2, 3]
    assert packed.positions_N.tolist() == [0, 1, 0, 1, 2]
    # The second example's first token is predicted from nothing, and so not at all.
    assert packed.predicting_K.tolist() == [0, 3]
    assert packed.targets_K.tolist() == [8, 3]
