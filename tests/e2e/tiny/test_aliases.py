"""Aliases live in MLflow: moved there by anybody, honoured here."""

import time
from pathlib import Path

import openai
import pytest
from mlflow import MlflowClient

from graft.client import Graft
from tests.support.tiny_jobs import known_to_the_gateway, publish
from tests.support.whole_stack import WholeStack, eventually

pytestmark = pytest.mark.e2e

REGISTERED = "default--tiny--moved"
PROMISED_SECONDS = 5.0


def test_an_alias_moved_by_mlflows_own_client_is_honoured_within_five_seconds(
    stack: WholeStack, graft: Graft, client: openai.OpenAI, base_folder: Path, tmp_path: Path
) -> None:
    first = publish(stack, base_folder, tmp_path, "moved", seed=1)
    second = publish(stack, base_folder, tmp_path, "moved", seed=2)
    known_to_the_gateway(graft, second)
    alone = {
        version.model: client.completions.create(model=version.model, prompt="hello", temperature=0).choices[0].text
        for version in (first, second)
    }
    assert alone[first.model] != alone[second.model]
    registry = MlflowClient(tracking_uri=stack.settings.tracking_uri, registry_uri=stack.settings.tracking_uri)
    for version in (first, second, first):
        registry.set_registered_model_alias(REGISTERED, "champion", str(version.version))
        moved = time.monotonic()
        eventually(
            lambda: [dict(adapter.aliases) for adapter in graft.adapters("tiny") if adapter.model == "tiny:moved"],
            lambda told, number=version.version: told == [{"champion": number}],
            30,
            "the alias is honoured",
        )
        assert time.monotonic() - moved < PROMISED_SECONDS
        answer = client.completions.create(model="tiny:moved", prompt="hello", temperature=0)
        assert (answer.model, answer.choices[0].text) == (version.model, alone[version.model])


def test_an_alias_set_over_grpc_is_mlflows(
    stack: WholeStack, graft: Graft, client: openai.OpenAI, base_folder: Path, tmp_path: Path
) -> None:
    version = publish(stack, base_folder, tmp_path, "named", seed=3)
    known_to_the_gateway(graft, version)
    graft.set_alias("tiny:named", "candidate", 1)
    registry = MlflowClient(tracking_uri=stack.settings.tracking_uri, registry_uri=stack.settings.tracking_uri)
    assert registry.get_registered_model("default--tiny--named").aliases == {"candidate": "1"}
    assert client.completions.create(model="tiny:named@candidate", prompt="hello").model == "tiny:named@1"
