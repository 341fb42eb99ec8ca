"""Counts what a plan's training rows have in tokens, rendered as training renders them. Needs no stack."""

from pathlib import Path

from graft.data.canonical import GradedPrompt, canonical
from graft.data.prepare import prepare
from graft.data.reading import read_rows
from graft.data.rendering import prompt_ids
from graft.data.tasks.catalog import builtin
from graft.data.tokenizers import load_tokenizer
from graft.domain.jobs import Method, OverLengthPolicy
from graft.domain.resources import BaseModel, DatasetFormat
from showcase.plans import Plan


def count_tokens(path: Path, format: str, plan: Plan, base: BaseModel) -> int:
    """Tokens of an epoch: prompt and completion; of a preference both answers, each with its prompt; of graded prompts
    the prompts alone. Raises InvalidArgument for rows that cannot be trained on."""
    tokenizer, kind = load_tokenizer(base.path), DatasetFormat(format)
    if plan.method == "reinforcement":
        prompts = [canonical(row, kind) for row in read_rows(path)]
        asked = [found.prompt for found in prompts if isinstance(found, GradedPrompt)]
        return sum(len(prompt_ids(prompt if isinstance(prompt, str) else tuple(prompt), tokenizer)) for prompt in asked)
    task = builtin(plan.task) if plan.task else None
    method, drop = Method(plan.method), OverLengthPolicy.DROP
    return prepare(path, kind, tokenizer, base.context_tokens, drop, method=method, task=task).stats.tokens
