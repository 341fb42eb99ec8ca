"""Scores of answers against references, one number in [0, 1] a row.

Owns the metrics; does not know who answered, nor how rows are averaged (`graft.evaluation.bootstrap`).
"""

from collections.abc import Sequence

from graft.domain.errors import InvalidArgument


def accuracy(answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """1.0 where the answer is the reference but for white space around it, else 0.0. Case counts.

    Raises:
        InvalidArgument: the two differ in length.
    """
    _check_lengths(answers, references)
    return [float(answer.strip() == reference.strip()) for answer, reference in zip(answers, references, strict=True)]


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """ROUGE-L F1 of each row (Lin 2004), words stemmed by Porter's rules, as the `rouge-score` package computes it.

    Its tokenizer keeps ASCII letters and digits only: the metric is for English.

    Raises:
        InvalidArgument: the two differ in length.
    """
    _check_lengths(answers, references)
    from rouge_score.rouge_scorer import RougeScorer  # brings nltk: only who asks for ROUGE pays the import

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return [
        float(scorer.score(reference, answer)["rougeL"].fmeasure)
        for answer, reference in zip(answers, references, strict=True)
    ]


def _check_lengths(answers: Sequence[str], references: Sequence[str]) -> None:
    if len(answers) != len(references):
        raise InvalidArgument(
            f"{len(answers)} answers cannot be scored against {len(references)} references: give one answer a row.",
            reason="UNEQUAL_LENGTHS",
        )
