from collections.abc import Callable

import pytest

from graft.domain.errors import InvalidArgument
from graft.evaluation.metrics import accuracy, rouge_l


def test_accuracy_forgives_white_space_around_a_label_and_nothing_else() -> None:
    answers = ["positive", " positive\n", "Positive", "positive.", "pos itive", ""]
    assert accuracy(answers, ["positive"] * len(answers)) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence() -> None:
    # Of the reference's four words, "killed" stemmed, each answer has 4, 2 and 1 in order.
    reference = "police killed the gunman"
    found = rouge_l(["police kill the gunman", "the gunman kill police", "the"], [reference] * 3)
    assert found == pytest.approx([1.0, 0.5, 2 * 1.0 * 0.25 / 1.25])


def test_rouge_l_tells_a_long_answer_from_a_short_one_by_precision() -> None:
    exact, padded = rouge_l(["a b c d", "a b c d e f g h"], ["a b c d"] * 2)
    assert (exact, padded) == pytest.approx((1.0, 2 * 0.5 * 1.0 / 1.5))


def test_an_empty_answer_scores_nothing() -> None:
    assert rouge_l(["", "!?"], ["a summary", "a summary"]) == [0.0, 0.0]


@pytest.mark.parametrize("metric", [accuracy, rouge_l])
def test_every_row_needs_an_answer(metric: Callable[[list[str], list[str]], list[float]]) -> None:
    with pytest.raises(InvalidArgument, match=r"2 answers .* 1 references") as error:
        metric(["a", "b"], ["a"])
    assert error.value.reason == "UNEQUAL_LENGTHS"
    assert metric([], []) == []
