"""Writes adapters: checkpoints, and the final folder with the probes that prove it. Does not train."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graft.data.prepare import Example
from graft.training.batching import completion_tokens
from graft.training.objectives.supervised import mean_loss
from graft.training.spec import RunSpec

PROBES = 4
"""Examples whose mean log-probability is kept with the adapter, for proof that the engine computes the same."""
PROBE_CANDIDATES = 64
"""The probes are the shortest of so many: cheap to score, and the likeliest to fit the engine's context."""


def save_adapter(model: Any, folder: Path, about: dict[str, Any] | None = None) -> None:
    """Writes beside `folder` and renames: a folder of that name is always whole. `about` becomes `graft.json`."""
    temporary = folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary, safe_serialization=True)
    (temporary / "README.md").unlink(missing_ok=True)  # peft's model card template, empty but for its headings
    if about is not None:
        (temporary / "graft.json").write_text(json.dumps(about, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def describe(spec: RunSpec, model: Any, examples: Sequence[Example]) -> dict[str, Any]:
    """The content of `graft.json`: what was trained, and the probes as `model` scores them now."""
    candidates = [example for example in examples if completion_tokens(example)][:PROBE_CANDIDATES]
    probes = []
    for example in sorted(candidates, key=lambda item: len(item.token_ids))[:PROBES]:
        # The prompt up to the first learned token, and everything after it as one completion. The very first token is
        # predicted from nothing and can be no completion.
        start = example.loss_mask.index(True, 1)
        learned = [position >= start for position in range(len(example.token_ids))]
        probes.append(
            {
                "prompt_token_ids": list(example.token_ids[:start]),
                "completion_token_ids": list(example.token_ids[start:]),
                "mean_logprob": -mean_loss(model, [Example(example.token_ids, learned)]),
            }
        )
    return {
        "base_model": spec.base_model,
        "base_model_digest": spec.base_model_digest,
        "job": spec.job_id,
        "attempt": spec.attempt,
        "dtype": str(model.get_base_model().dtype).removeprefix("torch."),
        "probes": probes,
    }
