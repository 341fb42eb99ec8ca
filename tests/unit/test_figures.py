import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from sacrebleu.metrics import CHRF
from sklearn.metrics import confusion_matrix, f1_score, precision_recall_fscore_support

from graft.domain import evaluations as domain
from graft.domain.errors import InvalidArgument
from graft.evaluation import metrics
from graft.evaluation.confusion import confusion
from graft.evaluation.figures import (
    METRICS,
    Answered,
    Graded,
    Likelihood,
    Preference,
    Row,
    difference,
    measure,
    scores,
)

LABELS = ("world", "sport", "business", "science")
RANDOM = np.random.default_rng(0)
REFERENCES = [str(label) for label in RANDOM.choice(LABELS, 200, p=(0.6, 0.2, 0.15, 0.05))]
ANSWERS = [
    each if keep else str(RANDOM.choice(LABELS))
    for each, keep in zip(REFERENCES, RANDOM.random(200) < 0.6, strict=True)
]
OTHERS = [
    each if keep else str(RANDOM.choice(LABELS))
    for each, keep in zip(REFERENCES, RANDOM.random(200) < 0.4, strict=True)
]


def _labelled(answers: Sequence[str], references: Sequence[str] = REFERENCES) -> list[Row]:
    return [Answered(answer, (reference,)) for answer, reference in zip(answers, references, strict=True)]


LIKELIHOODS: list[Row] = [
    Likelihood(float(tokens * RANDOM.gamma(3)), int(tokens), 4 * int(tokens)) for tokens in RANDOM.integers(1, 90, 60)
]


def _rows_for(name: str) -> list[Row]:
    return {
        Answered: _labelled(ANSWERS),
        Likelihood: LIKELIHOODS,
        Preference: [Preference(float(a), float(b)) for a, b in RANDOM.normal(size=(50, 2))],
        Graded: [Graded(120, int(c)) for c in RANDOM.integers(0, 121, 30)],
    }[METRICS[name].row]


# -- exact match and token F1 --------------------------------------------------------------------------------------


def test_exact_match_forgives_case_punctuation_articles_and_white_space() -> None:
    answers = ["The  Eiffel Tower.", "eiffel tower", "An Eiffel-Tower", "Eiffel", "a", "theatre"]
    references = ["Eiffel tower", "the Eiffel Tower", "eiffeltower", "Eiffel Tower", "", "atre"]
    assert metrics.exact_match(answers, references) == [1.0, 1.0, 1.0, 0.0, 1.0, 0.0]


def test_token_f1_counts_shared_words_as_often_as_both_hold_them() -> None:
    # 2 of 3 words said, 2 of 4 wanted: precision 2/3, recall 1/2.
    (found,) = metrics.token_f1(["red red blue"], ["Red, the green blue yellow"])
    assert found == pytest.approx(2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2))


def test_token_f1_of_texts_without_words_is_whether_both_are() -> None:
    assert metrics.token_f1(["the", "", "x"], ["", "x", "..."]) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("name", ["accuracy", "exact_match", "token_f1", "rouge_1", "rouge_2", "rouge_l", "chrf"])
def test_of_several_references_the_most_favourable_counts(name: str) -> None:
    score = getattr(metrics, name)
    answer, near, far = "four small words here", "four small words here", "something else entirely now"
    assert score([answer] * 3, [(far, near), (near, far), far]) == pytest.approx(
        [score([answer], [near])[0]] * 2 + [score([answer], [far])[0]]
    )
    assert score([answer], [near])[0] > score([answer], [far])[0]


def test_a_row_without_references_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="Row 1 has no reference") as error:
        metrics.token_f1(["a", "b"], ["a", ()])
    assert error.value.reason == "NO_REFERENCE"


# -- ROUGE and chrF ------------------------------------------------------------------------------------------------


def test_rouge_1_and_2_are_the_f1_of_shared_words_and_pairs_of_words() -> None:
    answer, reference = "the gunman police killed", "police killed the gunman"
    assert metrics.rouge_1([answer], [reference]) == [1.0]
    assert metrics.rouge_2([answer], [reference]) == pytest.approx([2 / 3])  # "the gunman" and "police killed" of 3
    assert metrics.rouge_l([answer], [reference]) == [0.5]


def test_chrf_is_sacrebleus_sentence_chrf_over_100() -> None:
    answers = ["the cat is on the mat", "katze", "", "ein Häuschen"]
    references = [("there is a cat on the mat", "the cat sits on the mat"), ("Katzen",), ("x",), ("ein Haus",)]
    expected = [
        CHRF().sentence_score(answer, list(choices)).score / 100
        for answer, choices in zip(answers, references, strict=True)
    ]
    assert metrics.chrf(answers, references) == pytest.approx(expected)
    assert 0 < expected[0] < 1


# -- pass@k --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_draws_of_k_samples_that_hold_a_correct_one(n: int) -> None:
    for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
        draws = list(itertools.combinations([True] * correct + [False] * (n - correct), k))
        expected = sum(any(draw) for draw in draws) / len(draws)
        assert metrics.pass_at_k([n], [correct], k) == pytest.approx([expected])


def test_pass_at_k_does_not_overflow() -> None:
    assert metrics.pass_at_k([5000], [1], 100) == pytest.approx([100 / 5000])


@pytest.mark.parametrize(
    ("samples", "correct", "k", "reason"),
    [
        ([5], [1], 10, "TOO_FEW_SAMPLES"),
        ([5], [6], 1, "INVALID_GRADES"),
        ([5], [-1], 1, "INVALID_GRADES"),
        ([5], [1], 0, "INVALID_K"),
        ([5, 5], [1], 1, "UNEQUAL_LENGTHS"),
    ],
)
def test_impossible_grades_are_refused(samples: list[int], correct: list[int], k: int, reason: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        metrics.pass_at_k(samples, correct, k)
    assert error.value.reason == reason


# -- macro-F1 and the confusion matrix -----------------------------------------------------------------------------


@pytest.mark.parametrize("answers", [ANSWERS, OTHERS, REFERENCES, ["world"] * 200])
def test_macro_f1_is_scikit_learns(answers: list[str]) -> None:
    found = measure("macro_f1", _labelled(answers), resamples=10)
    assert found.value == pytest.approx(f1_score(REFERENCES, answers, average="macro", zero_division=0))


def test_an_answer_that_is_no_label_is_a_miss_and_no_false_alarm() -> None:
    answers = ["?" if place % 7 == 0 else answer for place, answer in enumerate(ANSWERS)]
    found = measure("macro_f1", _labelled(answers), labels=LABELS, resamples=10).value
    assert found == pytest.approx(f1_score(REFERENCES, answers, labels=LABELS, average="macro"))
    assert found < measure("macro_f1", _labelled(ANSWERS), resamples=10).value


def test_a_label_that_nobody_mentions_does_not_count() -> None:
    rows = _labelled(["a", "b"], ["a", "a"])
    assert measure("macro_f1", rows, labels=("a", "b", "c"), resamples=10).value == pytest.approx((2 / 3 + 0) / 2)


def test_the_matrix_is_scikit_learns_with_a_column_for_other_answers() -> None:
    answers = ["nonsense", " sport \n", *ANSWERS[2:]]
    found = confusion(answers, REFERENCES, LABELS)
    stripped = [answer.strip() for answer in answers]
    expected = confusion_matrix(REFERENCES, stripped, labels=[*LABELS, "nonsense"])
    assert np.array(found.counts).tolist() == expected[:-1].tolist()
    assert sum(row[-1] for row in found.counts) == 1
    precision, recall, f1, support = precision_recall_fscore_support(REFERENCES, stripped, labels=LABELS)
    assert [each.precision for each in found.scores()] == pytest.approx(list(precision))
    assert [each.recall for each in found.scores()] == pytest.approx(list(recall))
    assert [each.f1 for each in found.scores()] == pytest.approx(list(f1))
    assert [each.references for each in found.scores()] == list(support)


def test_a_label_never_answered_has_no_precision() -> None:
    (a, b, c) = confusion(["a", "a"], ["a", "b"], ["a", "b", "c"]).scores()
    assert (a.precision, a.recall) == (0.5, 1.0)
    assert (b.precision, b.recall, b.f1) == (None, 0.0, 0.0)
    assert (c.precision, c.recall, c.f1, c.references) == (None, None, None, 0)


@pytest.mark.parametrize(
    ("references", "labels", "reason"),
    [(["a"], [], "INVALID_LABELS"), (["a"], ["a", "a "], "INVALID_LABELS"), (["b"], ["a"], "UNKNOWN_LABEL")],
)
def test_labels_that_do_not_fit_are_refused(references: list[str], labels: list[str], reason: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        confusion(["a"], references, labels)
    assert error.value.reason == reason


# -- perplexity and win rate ---------------------------------------------------------------------------------------


def test_perplexity_weighs_tokens_and_not_rows() -> None:
    rows: list[Row] = [Likelihood(3 * math.log(2), 3), Likelihood(math.log(32), 1)]
    assert measure("perplexity", rows).value == pytest.approx(2 ** ((3 + 5) / 4))


def test_bits_per_byte_are_the_same_whatever_the_tokens() -> None:
    fine, coarse = Likelihood(12 * math.log(2), 6, 24), Likelihood(12 * math.log(2), 3, 24)
    assert measure("bits_per_byte", [fine]).value == measure("bits_per_byte", [coarse]).value == pytest.approx(0.5)


def test_perplexities_of_two_tokenizers_are_not_compared() -> None:
    fine, coarse = Likelihood(12.0, 6, 24), Likelihood(12.0, 3, 24)
    with pytest.raises(InvalidArgument, match="bits_per_byte") as error:
        difference("perplexity", [fine], [coarse])
    assert error.value.reason == "UNPAIRED_TOKENS"
    assert difference("bits_per_byte", [fine], [coarse]).value == 0


def test_a_tie_is_half_a_win() -> None:
    rows: list[Row] = [Preference(-1.0, -2.0), Preference(-2.0, -1.0), Preference(-1.0, -1.0), Preference(0, -math.inf)]
    assert scores("win_rate", rows) == [1.0, 0.0, 0.5, 1.0]
    assert measure("win_rate", rows).value == 0.625


# -- intervals -----------------------------------------------------------------------------------------------------


def _drawn(n: int, resamples: int) -> list[list[int]]:
    return np.random.default_rng(0).integers(n, size=(resamples, n)).tolist()


@pytest.mark.parametrize("name", ["macro_f1", "perplexity", "accuracy", "pass_at_5"])
def test_an_interval_is_that_of_the_statistic_of_each_resample_one_by_one(name: str) -> None:
    rows = _rows_for(name)
    labels = LABELS if name == "macro_f1" else ()
    each = [
        measure(name, [rows[row] for row in drawn], labels=labels, resamples=1).value
        for drawn in _drawn(len(rows), 100)
    ]
    found = measure(name, rows, labels=labels, resamples=100)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(each, [0.025, 0.975])))
    assert found.low < found.value < found.high
    assert found.n == len(rows)


def test_the_brute_force_agrees_when_scikit_learn_computes_macro_f1() -> None:
    references = np.array(REFERENCES)
    ours, theirs = np.array(ANSWERS), np.array(OTHERS)
    # Every label is in every resample's answers or references, so that both leave out none.
    each = [
        f1_score(references[drawn], ours[drawn], average="macro", zero_division=0)
        - f1_score(references[drawn], theirs[drawn], average="macro", zero_division=0)
        for drawn in _drawn(200, 60)
    ]
    found = difference("macro_f1", _labelled(ANSWERS), _labelled(OTHERS), resamples=60)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(each, [0.025, 0.975])))


def test_a_paired_difference_is_narrower_than_two_intervals_apart() -> None:
    worse = [Likelihood(row.nats * 1.02, row.tokens) for row in LIKELIHOODS if isinstance(row, Likelihood)]
    better = [Likelihood(row.nats, row.tokens) for row in LIKELIHOODS if isinstance(row, Likelihood)]
    alone, apart = measure("perplexity", better), difference("perplexity", worse, better)
    assert apart.low > 0
    assert apart.high - apart.low < (alone.high - alone.low) / 5
    assert apart.value == pytest.approx(measure("perplexity", worse).value - alone.value)


def test_the_domain_names_every_metric_with_what_it_is_computed_from() -> None:
    kinds = {Answered: "answers", Graded: "grades", Preference: "pairs", Likelihood: "texts"}
    assert {name: kinds[one.row] for name, one in METRICS.items()} == domain.METRICS
    for name, samples in domain.SAMPLES_NEEDED.items():
        measure(name, [Graded(samples, 0)])
        if samples > 1:
            with pytest.raises(InvalidArgument):
                measure(name, [Graded(samples - 1, 0)])
    assert {name for name, kind in domain.METRICS.items() if kind == "grades"} == set(domain.SAMPLES_NEEDED)


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_measures_its_kind_of_rows_and_no_other(name: str) -> None:
    rows = _rows_for(name)
    found = measure(name, rows, resamples=50)
    assert (found.metric, found.n) == (name, len(rows))
    assert 0 <= found.low <= found.value <= found.high <= METRICS[name].largest
    same = difference(name, rows, rows, resamples=50)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    wrong: Row = Preference(0, 0) if METRICS[name].row is not Preference else Graded(1, 1)
    with pytest.raises(InvalidArgument, match=METRICS[name].row.__name__) as error:
        measure(name, [*rows, wrong])
    assert error.value.reason == "WRONG_ROWS"
    with pytest.raises(InvalidArgument) as error:
        measure(name, [])
    assert error.value.reason == "NO_SCORES"


def test_scores_of_rows_average_to_the_figure_where_there_are_any() -> None:
    rows = _labelled(ANSWERS)
    assert np.mean(scores("accuracy", rows) or []) == pytest.approx(measure("accuracy", rows, resamples=1).value)
    assert scores("macro_f1", rows) is None


def test_an_unknown_metric_names_those_that_exist() -> None:
    with pytest.raises(InvalidArgument, match=r"'bleu' does not exist\. Existing: accuracy, macro_f1,.* win_rate\."):
        measure("bleu", _labelled(ANSWERS))


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("perplexity", Likelihood(1.0, 0), "EMPTY_ROW"),
        ("perplexity", Likelihood(math.inf, 3), "SCORE_NOT_FINITE"),
        ("perplexity", Likelihood(5000.0, 3), "SCORE_NOT_FINITE"),
        ("bits_per_byte", Likelihood(1.0, 3), "EMPTY_ROW"),
        ("win_rate", Preference(math.nan, 0), "SCORE_NOT_FINITE"),
        ("macro_f1", Answered("a", ("a", "b")), "NOT_ONE_LABEL"),
        ("exact_match", Answered("a", ()), "NO_REFERENCE"),
    ],
)
def test_a_row_that_cannot_be_scored_is_refused(name: str, row: Row, reason: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        measure(name, [row])
    assert error.value.reason == reason


@pytest.mark.parametrize(
    ("ours", "theirs", "reason"),
    [
        ([Answered("a", ("a",))], [Answered("a", ("b",))], "UNPAIRED_ROWS"),
        ([Answered("a", ("a",))], [Answered("a", ("a",))] * 2, "UNEQUAL_LENGTHS"),
    ],
)
def test_rows_of_other_questions_are_not_compared(ours: list[Row], theirs: list[Row], reason: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        difference("accuracy", ours, theirs)
    assert error.value.reason == reason
