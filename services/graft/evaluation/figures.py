"""The figures an evaluation gives: a metric by name, of rows, with its sample size and 95% interval.

Owns the registry of metrics and what each needs to know of a row; does not know who answered or how. How to add one:
write a scorer in `graft.evaluation.metrics` (a mean over rows) or a `Statistic` (anything else), and give it an entry
below. Names are valid as MLflow metrics and JSON fields.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from graft.domain.errors import InvalidArgument
from graft.evaluation import metrics
from graft.evaluation.bootstrap import RESAMPLES, Statistic, estimate, mean_of
from graft.evaluation.confusion import macro_f1_of


@dataclass(frozen=True)
class Answered:
    """A generated answer and the references it may match, one at least. Classification has one, a label."""

    answer: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Likelihood:
    """What a model thinks of one given text.

    Attributes:
        nats: the negative log-probabilities of its tokens, summed.
        tokens: how many those are.
        text_bytes: UTF-8 bytes of the text that those tokens spell; 0 where it was not counted.
    """

    nats: float
    tokens: int
    text_bytes: int = 0


@dataclass(frozen=True)
class Preference:
    """The summed log-probabilities, in nats, of a pair of completions."""

    chosen: float
    rejected: float


@dataclass(frozen=True)
class Graded:
    """How many samples of one problem passed its grader."""

    samples: int
    correct: int


Row = Answered | Likelihood | Preference | Graded


@dataclass(frozen=True)
class Metric:
    """A metric by name.

    Attributes:
        title: as people write it.
        percent: shown as a percentage; the value itself is a share in [0, 1].
        row: the kind of row that it is computed from.
        labels: whether it needs the set of labels, by default those of the references.
        largest: the best or worst value possible at the upper end; `inf` without one. The lower end is 0.
        statistic: of rows and labels.
    """

    name: str
    title: str
    higher_is_better: bool
    percent: bool
    row: type[Row]
    labels: bool
    largest: float
    about: str
    statistic: Callable[[Sequence[Row], Sequence[str]], Statistic]


@dataclass(frozen=True)
class Figure:
    """A metric's value with its 95% interval, or a difference of two, from `n` rows (or pairs, or problems)."""

    metric: str
    value: float
    low: float
    high: float
    n: int


def metric(name: str) -> Metric:
    """Raises InvalidArgument, naming those that exist, for an unknown one."""
    if name not in METRICS:
        raise InvalidArgument(
            f"Metric {name!r} does not exist. Existing: {', '.join(METRICS)}.",
            reason="UNKNOWN_METRIC",
            metadata={"metric": name},
        )
    return METRICS[name]


def measure(
    metric_name: str, rows: Sequence[Row], *, labels: Sequence[str] = (), resamples: int = RESAMPLES, seed: int = 0
) -> Figure:
    """The metric of `rows` with its 95% interval.

    Args:
        rows: of the kind that `METRICS[metric_name].row` says.
        labels: every label, for metrics with `labels`; by default the references' own.

    Raises:
        InvalidArgument: an unknown metric, no rows, rows of another kind, or as the metric's scorer.
    """
    return figure_of(metric_name, statistic(metric_name, rows, labels), len(rows), resamples=resamples, seed=seed)


def difference(
    metric_name: str,
    rows: Sequence[Row],
    baseline: Sequence[Row],
    *,
    labels: Sequence[str] = (),
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Figure:
    """The metric of `rows` less that of `baseline`; each resample takes the same rows of both (Koehn 2004).

    Raises:
        InvalidArgument: rows that do not pair up (another number, other references, and for perplexity other token
            counts, since figures per token of two tokenizers cannot be compared), or as `measure`.
    """
    ours, theirs = statistic(metric_name, rows, labels), statistic(metric_name, baseline, labels)
    check_pairs(metric_name, rows, baseline)
    return figure_of(metric_name, less(ours, theirs), len(rows), resamples=resamples, seed=seed)


def scores(metric_name: str, rows: Sequence[Row]) -> list[float] | None:
    """Each row's own score; `None` for a metric that is no mean over rows.

    Raises:
        InvalidArgument: as `measure`.
    """
    found = metric(metric_name)
    if metric_name not in _SCORERS:
        return None
    _check_kind(found, rows)
    return _SCORERS[metric_name](rows)


def statistic(metric_name: str, rows: Sequence[Row], labels: Sequence[str] = ()) -> Statistic:
    """The metric as a statistic of `rows`, each of which is scored once, here.

    Raises:
        InvalidArgument: as `measure`.
    """
    found = metric(metric_name)
    if not rows:
        raise InvalidArgument(f"{found.title} needs at least one row.", reason="NO_SCORES")
    _check_kind(found, rows)
    return found.statistic(rows, labels)


def less(ours: Statistic, theirs: Statistic) -> Statistic:
    """The paired difference of two statistics."""
    return lambda drawn: ours(drawn) - theirs(drawn)


def figure_of(metric_name: str, statistic: Statistic, n: int, *, resamples: int = RESAMPLES, seed: int = 0) -> Figure:
    """The figure of a statistic of `n` rows. Raises InvalidArgument as `graft.evaluation.bootstrap.estimate`."""
    found = estimate(statistic, n, resamples=resamples, seed=seed)
    return Figure(metric_name, found.value, found.low, found.high, n)


def _check_kind(found: Metric, rows: Sequence[Row]) -> None:
    for place, row in enumerate(rows):
        if not isinstance(row, found.row):
            raise InvalidArgument(
                f"{found.title} is computed from rows of {found.row.__name__}, but row {place} is one of "
                f"{type(row).__name__}.",
                reason="WRONG_ROWS",
            )


def check_pairs(name: str, rows: Sequence[Row], baseline: Sequence[Row]) -> None:
    """Raises InvalidArgument, as `difference`, for rows that do not pair up."""
    if len(rows) != len(baseline):
        raise InvalidArgument(
            f"{len(rows)} rows cannot be paired with {len(baseline)} of the baseline: evaluate the same rows.",
            reason="UNEQUAL_LENGTHS",
        )
    for place, pair in enumerate(zip(rows, baseline, strict=True)):
        match pair:
            case Answered() as one, Answered() as other if one.references != other.references:
                what, reason = "has other references in the baseline", "UNPAIRED_ROWS"
            case Likelihood() as one, Likelihood() as other if name == "perplexity" and one.tokens != other.tokens:
                what, reason = "has another number of tokens in the baseline: compare bits_per_byte", "UNPAIRED_TOKENS"
            case Likelihood() as one, Likelihood() as other if one.text_bytes != other.text_bytes:
                what, reason = "is a text of another length in the baseline", "UNPAIRED_ROWS"
            case _:
                continue
        raise InvalidArgument(f"Row {place} {what}.", reason=reason)


def _ratio(
    over: Sequence[float], under: Sequence[float], then: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]
) -> Statistic:
    """`then` of the ratio of two sums over rows."""
    over_R, under_R = np.asarray(over, dtype=np.float64), np.asarray(under, dtype=np.float64)
    return lambda rows_BR: then(over_R[rows_BR].sum(axis=1) / under_R[rows_BR].sum(axis=1))


def _perplexity(rows: Sequence[Row], _labels: Sequence[str]) -> Statistic:
    nats, tokens, _ = _likelihoods(rows)
    _check_counts(tokens, "tokens")

    def exp(nats_per_token: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        with np.errstate(over="ignore"):  # an infinite perplexity is refused with a sentence of its own
            found: npt.NDArray[np.float64] = np.exp(nats_per_token)
        return found

    return _ratio(nats, tokens, exp)


def _bits_per_byte(rows: Sequence[Row], _labels: Sequence[str]) -> Statistic:
    nats, _, text_bytes = _likelihoods(rows)
    _check_counts(text_bytes, "bytes of text")
    return _ratio(nats, text_bytes, lambda nats_per_byte: nats_per_byte / math.log(2))


def _likelihoods(rows: Sequence[Row]) -> tuple[list[float], list[int], list[int]]:
    kept = [row for row in rows if isinstance(row, Likelihood)]
    for place, row in enumerate(kept):
        if not math.isfinite(row.nats):
            raise InvalidArgument(f"The nats of row {place} are {row.nats}.", reason="SCORE_NOT_FINITE")
    return [row.nats for row in kept], [row.tokens for row in kept], [row.text_bytes for row in kept]


def _check_counts(counts: Sequence[int], what: str) -> None:
    for place, count in enumerate(counts):
        if count < 1:
            raise InvalidArgument(f"Row {place} has {count} {what}: it needs at least 1.", reason="EMPTY_ROW")


def _macro_f1(rows: Sequence[Row], labels: Sequence[str]) -> Statistic:
    answers, references = labelled(rows)
    return macro_f1_of(answers, references, labels or sorted({reference.strip() for reference in references}))


def labelled(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Answers and references of a classification.

    Raises:
        InvalidArgument: a row with no reference or several.
    """
    kept = [row for row in rows if isinstance(row, Answered)]
    for place, row in enumerate(kept):
        if len(row.references) != 1:
            raise InvalidArgument(
                f"Row {place} has {len(row.references)} references: a label is one.", reason="NOT_ONE_LABEL"
            )
    return [row.answer for row in kept], [row.references[0] for row in kept]


_Scorer = Callable[[Sequence[Row]], list[float]]


def _of_answers(scorer: Callable[[Sequence[str], metrics.References], list[float]]) -> _Scorer:
    def score(rows: Sequence[Row]) -> list[float]:
        kept = [row for row in rows if isinstance(row, Answered)]
        return scorer([row.answer for row in kept], [row.references for row in kept])

    return score


def _of_grades(k: int) -> _Scorer:
    def score(rows: Sequence[Row]) -> list[float]:
        kept = [row for row in rows if isinstance(row, Graded)]
        return metrics.pass_at_k([row.samples for row in kept], [row.correct for row in kept], k)

    return score


def _win_rate(rows: Sequence[Row]) -> list[float]:
    kept = [row for row in rows if isinstance(row, Preference)]
    return metrics.wins([row.chosen for row in kept], [row.rejected for row in kept])


_SCORERS: dict[str, _Scorer] = {
    "accuracy": _of_answers(metrics.accuracy),
    "exact_match": _of_answers(metrics.exact_match),
    "token_f1": _of_answers(metrics.token_f1),
    "rouge_1": _of_answers(metrics.rouge_1),
    "rouge_2": _of_answers(metrics.rouge_2),
    "rouge_l": _of_answers(metrics.rouge_l),
    "chrf": _of_answers(metrics.chrf),
    "pass_at_1": _of_grades(1),
    "pass_at_5": _of_grades(5),
    "pass_at_10": _of_grades(10),
    "pass_at_100": _of_grades(100),
    "win_rate": _win_rate,
}


def _mean(name: str, title: str, row: type[Row], percent: bool, about: str) -> Metric:
    def statistic(rows: Sequence[Row], _labels: Sequence[str]) -> Statistic:
        return mean_of(_SCORERS[name](rows))

    return Metric(name, title, True, percent, row, False, 1.0, about, statistic)


_ALL = (
    _mean("accuracy", "accuracy", Answered, True, "answers equal to a reference but for white space around them"),
    Metric(
        "macro_f1",
        "macro-F1",
        True,
        False,
        Answered,
        True,
        1.0,
        "the unweighted mean of the labels’ F1; an answer that is no label is a miss",
        _macro_f1,
    ),
    _mean("exact_match", "exact match", Answered, True, "answers equal to a reference in SQuAD’s normal form"),
    _mean("token_f1", "token F1", Answered, True, "F1 of words shared with the nearest reference, in SQuAD’s form"),
    _mean("rouge_1", "ROUGE-1", Answered, False, "F1 of shared stemmed words (Lin 2004)"),
    _mean("rouge_2", "ROUGE-2", Answered, False, "F1 of shared pairs of stemmed words (Lin 2004)"),
    _mean("rouge_l", "ROUGE-L", Answered, False, "F1 of the longest common subsequence of stemmed words (Lin 2004)"),
    _mean("chrf", "chrF", Answered, False, "F2 of shared character n-grams, by row (Popović 2015)"),
    *(
        _mean(
            f"pass_at_{k}",
            f"pass@{k}",
            Graded,
            True,
            f"the chance that at least one of {k} samples passes, without bias (Chen et al. 2021)"
            if k > 1
            else "the chance that a sample passes (Chen et al. 2021)",
        )
        for k in (1, 5, 10, 100)
    ),
    Metric(
        "perplexity",
        "perplexity",
        False,
        False,
        Likelihood,
        False,
        math.inf,
        "exp of the mean nats a token, over all tokens; comparable for one tokenizer only",
        _perplexity,
    ),
    Metric(
        "bits_per_byte",
        "bits per byte",
        False,
        False,
        Likelihood,
        False,
        math.inf,
        "the cost of the text, comparable between tokenizers",
        _bits_per_byte,
    ),
    _mean("win_rate", "win rate", Preference, True, "pairs whose chosen completion is the likelier; ties count half"),
)
METRICS: dict[str, Metric] = {each.name: each for each in _ALL}
