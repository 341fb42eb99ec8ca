"""Scores of answers against references, and of samples, pairs and log-probabilities: one number in [0, 1] a row.

Owns the metrics that are means over rows; does not know who answered, nor how rows are averaged
(`graft.evaluation.bootstrap`). What is no mean lies in `graft.evaluation.figures`.

A row's reference is one text, or a tuple of texts of which the most favourable counts.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from graft.domain.errors import InvalidArgument

References = Sequence[str | tuple[str, ...]]

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def accuracy(answers: Sequence[str], references: References) -> list[float]:
    """1.0 where the answer is the reference but for white space around it, else 0.0. Case counts.

    Raises:
        InvalidArgument: the two differ in length, or a row has no reference.
    """
    return _best(lambda answer, reference: float(answer.strip() == reference.strip()), answers, references)


def exact_match(answers: Sequence[str], references: References) -> list[float]:
    """1.0 where answer and reference are equal once normalised as SQuAD does (Rajpurkar et al. 2016), else 0.0.

    Raises:
        InvalidArgument: as `accuracy`.
    """
    return _best(lambda answer, reference: float(normalise(answer) == normalise(reference)), answers, references)


def token_f1(answers: Sequence[str], references: References) -> list[float]:
    """F1 of the words that answer and reference share, normalised and counted as in SQuAD 2.0 (Rajpurkar et al. 2018).

    Two texts without words agree: 1.0.

    Raises:
        InvalidArgument: as `accuracy`.
    """
    return _best(_shared_words_f1, answers, references)


def rouge_1(answers: Sequence[str], references: References) -> list[float]:
    """ROUGE-1 F1 of each row: shared words. See `rouge_l`."""
    return _rouge("rouge1", answers, references)


def rouge_2(answers: Sequence[str], references: References) -> list[float]:
    """ROUGE-2 F1 of each row: shared pairs of neighbouring words. See `rouge_l`."""
    return _rouge("rouge2", answers, references)


def rouge_l(answers: Sequence[str], references: References) -> list[float]:
    """ROUGE-L F1 of each row (Lin 2004), words stemmed by Porter's rules, as the `rouge-score` package computes it.

    Its tokenizer keeps ASCII letters and digits only: the metric is for English.

    Raises:
        InvalidArgument: as `accuracy`.
    """
    return _rouge("rougeL", answers, references)


def chrf(answers: Sequence[str], references: References) -> list[float]:
    """Sentence chrF of each row (Popović 2015; characters up to 6-grams, β = 2), as `sacrebleu` computes it, over 100.

    Raises:
        InvalidArgument: as `accuracy`.
    """
    from sacrebleu.metrics.chrf import CHRF  # as with ROUGE, only who asks for it pays the import

    scorer = CHRF()
    return _best(lambda answer, reference: scorer.sentence_score(answer, [reference]).score / 100, answers, references)


def pass_at_k(samples: Sequence[int], correct: Sequence[int], k: int) -> list[float]:
    """The chance that at least one of k samples solves the problem: 1 − C(n−c, k) / C(n, k), without bias.

    Chen et al. 2021 (arXiv:2107.03374), equation 1, as the product that does not overflow.

    Args:
        samples: n of each problem.
        correct: c of each problem, those of its n samples that passed.

    Raises:
        InvalidArgument: unequal lengths, k below 1, fewer than k samples, or c outside of 0 to n.
    """
    _check_lengths(samples, correct, "sample counts", "counts of correct samples")
    if k < 1:
        raise InvalidArgument(f"k is {k}: it must be at least 1.", reason="INVALID_K")
    chances = []
    for row, (n, c) in enumerate(zip(samples, correct, strict=True)):
        if n < k:
            raise InvalidArgument(
                f"Problem {row} has {n} samples: pass@{k} needs at least {k}.", reason="TOO_FEW_SAMPLES"
            )
        if not 0 <= c <= n:
            raise InvalidArgument(
                f"Problem {row} has {c} correct samples of {n}: give 0 to {n}.", reason="INVALID_GRADES"
            )
        chances.append(1.0 if n - c < k else float(1 - np.prod(1 - k / np.arange(n - c + 1, n + 1))))
    return chances


def wins(chosen: Sequence[float], rejected: Sequence[float]) -> list[float]:
    """1.0 where the chosen completion's log-probability is above the rejected one's, 0.5 where equal, else 0.0.

    Args:
        chosen: summed log-probability, in nats, of the completion that people preferred, one a pair.
        rejected: that of the other one.

    Raises:
        InvalidArgument: unequal lengths, or a log-probability that is not a number.
    """
    _check_lengths(chosen, rejected, "chosen log-probabilities", "rejected ones")
    difference = np.asarray(chosen, dtype=np.float64), np.asarray(rejected, dtype=np.float64)
    for name, values in zip(("chosen", "rejected"), difference, strict=True):
        if np.isnan(values).any():
            row = int(np.flatnonzero(np.isnan(values))[0])
            raise InvalidArgument(f"The {name} log-probability of row {row} is no number.", reason="SCORE_NOT_FINITE")
    ours, theirs = difference
    scores: list[float] = ((ours > theirs) + 0.5 * (ours == theirs)).tolist()
    return scores


def normalise(text: str) -> str:
    """SQuAD's normal form: lower case, no ASCII punctuation, no English articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _shared_words_f1(answer: str, reference: str) -> float:
    said, wanted = normalise(answer).split(), normalise(reference).split()
    if not said or not wanted:
        return float(said == wanted)
    shared = (Counter(said) & Counter(wanted)).total()
    return 2 * shared / (len(said) + len(wanted))


def _rouge(kind: str, answers: Sequence[str], references: References) -> list[float]:
    from rouge_score.rouge_scorer import RougeScorer  # brings nltk: only who asks for ROUGE pays the import

    scorer = RougeScorer([kind], use_stemmer=True)
    return _best(lambda answer, reference: float(scorer.score(reference, answer)[kind].fmeasure), answers, references)


def _best(score: Callable[[str, str], float], answers: Sequence[str], references: References) -> list[float]:
    """Each answer's score against the most favourable of its references."""
    _check_lengths(answers, references, "answers", "references")
    scores = []
    for row, (answer, reference) in enumerate(zip(answers, references, strict=True)):
        choices = (reference,) if isinstance(reference, str) else reference
        if not choices:
            raise InvalidArgument(f"Row {row} has no reference: give at least one.", reason="NO_REFERENCE")
        scores.append(max(score(answer, choice) for choice in choices))
    return scores


def _check_lengths(ones: Sequence[object], others: Sequence[object], name: str, other_name: str) -> None:
    if len(ones) != len(others):
        raise InvalidArgument(
            f"{len(ones)} {name} cannot be scored against {len(others)} {other_name}: give one of each a row.",
            reason="UNEQUAL_LENGTHS",
        )
