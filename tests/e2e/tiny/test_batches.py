"""Many grafts on one rootstock: adapters come into a running engine, and share its batches without mixing."""

from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import openai
import pytest

from graft.api.v1 import adapter_pb2
from graft.client import Graft
from tests.support.tiny_jobs import Trained
from tests.support.whole_stack import WholeStack

pytestmark = pytest.mark.e2e

SPEAKERS = ("tiny", "tiny:sums@1", "tiny:echo@1")
PROMPTS = ("Number 5?", "Say 12", "a much longer prompt, of a length that no other one has", "x")
ANSWER_TOKENS = (48, 30, 40, 48)
"""A length each, so that requests leave the batch at different steps."""


def test_two_jobs_train_at_once(trained: Trained) -> None:
    assert trained.workers_at_once == 2


def test_both_adapters_are_in_the_engine_that_was_there_before_them(
    stack: WholeStack, graft: Graft, trained: Trained
) -> None:
    (replica,) = graft.residency()
    in_engine = {held.model for held in replica.adapters if held.tier == adapter_pb2.ResidentAdapter.TIER_ENGINE}
    assert {"tiny:sums@1", "tiny:echo@1"} <= in_engine
    assert replica.replica == trained.replica.replica
    assert replica.engine_restarts == trained.replica.engine_restarts == 0
    assert stack.engine_core() == trained.core
    assert [stack.process(name)["restarts"] for name in ("inference", "gateway", "orchestrator")] == [0, 0, 0]


@pytest.mark.usefixtures("trained")
def test_base_and_adapters_in_one_batch_answer_as_each_does_alone(client: openai.OpenAI) -> None:
    def answer(speaker: str, place: int) -> tuple[str, list[float]]:
        told = client.completions.create(
            model=speaker,
            prompt=PROMPTS[place],
            max_tokens=ANSWER_TOKENS[place],
            temperature=0,
            logprobs=0,
            extra_body={"ignore_eos": True},
        )
        assert told.model == speaker
        (choice,) = told.choices
        assert choice.logprobs is not None
        return choice.text, [value or 0.0 for value in choice.logprobs.token_logprobs or []]

    asked = [(speaker, place) for place in range(len(PROMPTS)) for speaker in SPEAKERS]
    alone = [answer(*one) for one in asked]
    for place in range(len(PROMPTS)):
        # Else a mix-up of speakers would pass below.
        said = [answer[1] for answer, (_, asked_for) in zip(alone, asked, strict=True) if asked_for == place]
        for one, other in combinations(said, 2):
            assert one != pytest.approx(other, abs=1e-2)
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(answer, *zip(*asked, strict=True)))
    assert [text for text, _ in together] == [text for text, _ in alone]
    for (_, expected), (_, found) in zip(alone, together, strict=True):
        assert found == pytest.approx(expected, abs=1e-3)
