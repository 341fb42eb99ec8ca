"""Writes adapters and whole models, checkpoints among them, and the probes that prove them. Does not train."""

import json
import shutil
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from graft.data.prepare import Example
from graft.training.batching import completion_tokens
from graft.training.imports import PeftModel
from graft.training.objectives.objective import ALONE, Group
from graft.training.objectives.supervised import mean_loss
from graft.training.sharding import gathered
from graft.training.spec import RunSpec
from graft.training.tuning import TRAINED

PROBES = 4
"""Examples whose mean log-probability is kept with the adapter, for proof that the engine computes the same."""
PROBE_CANDIDATES = 64
"""The probes are the shortest of so many: cheap to score."""
PROBE_TOKENS = 256
"""Longest probe. The trainer's context may be longer than the engine's, and every document of a raw text may fill it; a
wrong weight shows in the first tokens already."""
LINEAGE = "graft.json"
SHARD_SIZE = "2GB"
"""Of a whole model's files: small enough to be uploaded and, when a transfer breaks, sent again."""
KEPT_MODELS = 2
"""Checkpoints of whole models that stay on disk. Each is as large as the model: one more than the newest, for the case
that it is the one being written when the machine stops."""
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)

About = dict[str, Any]


def write_whole(folder: Path, write: Callable[[Path], object], about: About | None = None, task: str = "") -> None:
    """Lets `write` fill a folder beside `folder` and renames it: a folder of that name is always whole.

    `about` becomes `graft.json`, and the definition of a `task` becomes `task.yaml`.
    """
    temporary = folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    write(temporary)
    if about is not None:
        (temporary / LINEAGE).write_text(json.dumps(about, indent=1))
    if task:
        (temporary / "task.yaml").write_text(task, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def save_adapter(model: Any, folder: Path, about: About | None = None, task: str = "", group: Group = ALONE) -> None:
    """PEFT's own files of the adapter that trains. Called by all workers of a sharded group; rank 0 writes."""
    weights = gathered(model, group, trained_only=True)

    def write(temporary: Path) -> None:
        model.save_pretrained(temporary, safe_serialization=True, selected_adapters=[TRAINED], state_dict=weights)
        (temporary / "README.md").unlink(missing_ok=True)  # peft's model card template, empty but for its headings

    if group.rank == 0:
        write_whole(folder, write, about, task)


def save_model(
    model: Any, base_model: Path, folder: Path, about: About | None = None, task: str = "", group: Group = ALONE
) -> None:
    """A folder that plain transformers loads: sharded weights in the model's own type, and the base's tokenizer files.

    They are copied byte for byte, so that tokens and chat template are the base's. float32, where it was trained in it,
    is kept: rounded to 16 bits, a weight forgets most of a small change. Called by all workers of a sharded group; rank
    0, which gathers all weights on its CPU, writes.
    """
    weights = gathered(model, group, trained_only=False)

    def write(temporary: Path) -> None:
        model.save_pretrained(temporary, max_shard_size=SHARD_SIZE, state_dict=weights)
        for name in _TOKENIZER_FILES:
            if (base_model / name).is_file():
                shutil.copyfile(base_model / name, temporary / name)

    if group.rank == 0:
        write_whole(folder, write, about, task)


def save_checkpoint(model: Any, base_model: Path, folder: Path, group: Group = ALONE) -> None:
    """The adapter, or the whole model; of whole models only the newest KEPT_MODELS stay in `folder`'s parent. Called by
    all workers of a sharded group; rank 0 writes."""
    if isinstance(model, PeftModel):
        save_adapter(model, folder, group=group)
        return
    save_model(model, base_model, folder, group=group)
    if group.rank:
        return
    kept = sorted(folder.parent.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    for old in kept[:-KEPT_MODELS]:
        shutil.rmtree(old)


def describe(spec: RunSpec, model: Any, examples: Sequence[Example]) -> About:
    """The content of `graft.json`: what was trained, and the probes as `model` scores them now."""
    candidates = islice((example for example in examples if completion_tokens(example)), PROBE_CANDIDATES)
    probes = []
    for example in sorted(candidates, key=lambda item: len(item.token_ids))[:PROBES]:
        token_ids, start = _excerpt(example, min(PROBE_TOKENS, spec.context_tokens - 1))
        scored = [position >= start for position in range(len(token_ids))]
        probes.append(
            {
                "prompt_token_ids": token_ids[:start],
                "completion_token_ids": token_ids[start:],
                "mean_logprob": -mean_loss(model, [Example(token_ids, scored)]),
            }
        )
    return {
        "base_model": spec.base_model,
        "base_model_digest": spec.base_model_digest,
        "job": spec.job_id,
        "attempt": spec.attempt,
        "dtype": str(model.dtype).removeprefix("torch."),
        "probes": probes,
    }


def _excerpt(example: Example, most_tokens: int) -> tuple[list[int], int]:
    """The example, or `most_tokens` of it in a row, and where in it the completion starts.

    The completion is everything from the first learned token on. The very first token is predicted from nothing and can
    be no completion. Of a longer example the end is left out and, where a long prompt comes before the first learned
    token, the prompt's beginning. What is left is scored as a text of its own, by the trainer as by the engine.
    """
    start = example.loss_mask.index(True, 1)
    whole = len(example.token_ids) <= most_tokens
    first = 0 if whole else max(start - most_tokens // 2, 0)
    return list(example.token_ids[first : first + most_tokens]), start - first
