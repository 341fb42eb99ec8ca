"""Reinforcement at the door: what cannot be sampled or graded is refused before anything runs."""

import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict

from graft.api.v1.fine_tuning_job_pb2 import FineTuningJob
from tests.support.gateways import gateway, refused
from tests.unit.test_gateway_jobs import created, uploaded

ROWS = b"".join(json.dumps({"prompt": f"What is {n} + 1?", "answer": str(n + 1)}).encode() + b"\n" for n in range(8))
GRADER = {"kind": "numeric", "settings": {"field": "answer"}}


def fields(**given: Any) -> dict[str, Any]:
    made = ParseDict({"reinforcement": {"grader": GRADER}} | given, FineTuningJob())
    return {field.name: value for field, value in made.ListFields()}


async def test_prompts_with_a_grader_become_a_reinforcement_job(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        job = await created(it, training_dataset=await uploaded(it, ROWS), **fields())
        assert job.WhichOneof("method") == "reinforcement"
        assert job.reinforcement.grader.kind == "numeric"


@pytest.mark.parametrize(
    ("given", "field", "words"),
    [
        ({"full": {}}, "tuning", "cannot be loaded there as it is; use plain LoRA"),
        ({"last_layers": {}}, "tuning", "use plain LoRA"),
        ({"lora": {"use_dora": True}}, "lora.use_dora", "use plain LoRA"),
        ({"lora": {"modules_to_save": ["lm_head"]}}, "lora.modules_to_save", "use plain LoRA"),
        (
            {"reinforcement": {"grader": {"kind": "regex", "settings": {"pattern": "("}}}},
            "reinforcement.grader.settings.pattern",
            "is not a regular expression",
        ),
        ({"reinforcement": {"grader": {"kind": "taste"}}}, "reinforcement.grader.kind", "is none of exact_match"),
        (
            {"hyperparameters": {"context_tokens": 1024}},
            "hyperparameters.context_tokens",
            "more than the 512 tokens that the inference service samples within",
        ),
        (
            {"reinforcement": {"grader": GRADER, "max_completion_tokens": 512}},
            "reinforcement.max_completion_tokens",
            "512 leaves no room for a prompt in a context of 512",
        ),
        (
            {"hyperparameters": {"context_tokens": 64}},
            "reinforcement.max_completion_tokens",
            "64 leaves no room for a prompt in a context of 64",
        ),
        ({"hyperparameters": {"validation_fraction": 0.1}}, "hyperparameters.validation_fraction", "no held-out loss"),
    ],
)
async def test_what_cannot_be_sampled_or_graded_is_refused(
    tmp_path: Path, given: dict[str, Any], field: str, words: str
) -> None:
    async with gateway(tmp_path, GRAFT_SERVING_CONTEXT_TOKENS="512") as it:
        error = await refused(created(it, training_dataset=await uploaded(it, ROWS), **fields(**given)))
        assert field in [violation.field for violation in error.violations]
        assert words in " ".join(violation.description for violation in error.violations if violation.field == field)
