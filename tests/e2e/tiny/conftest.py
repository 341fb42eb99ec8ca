"""One stack that serves a tiny llama with random weights, and two jobs on it that most tests look at."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from graft.client import Graft
from tests.support.method_jobs import Jobs, train_all
from tests.support.tiny_jobs import BASE, Trained, train_two
from tests.support.tiny_llama import make_tiny_llama
from tests.support.whole_stack import WholeStack, make_stack, removed


@pytest.fixture(scope="package")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="package")
def stack(base_folder: Path) -> Iterator[WholeStack]:
    made = make_stack(
        {BASE: {"folder": str(base_folder), "license": "Apache-2.0"}},
        GRAFT_SERVING_BASE_MODEL=BASE,
        # Answers are compared between batches: in bfloat16 near-ties fall either way.
        GRAFT_SERVING_DTYPE="float32",
    )
    with removed(made) as stack:
        stack.start()
        yield stack
        assert stack.up is not None
        if stack.up.poll() is None:
            stack.interrupt()


@pytest.fixture(scope="package")
def graft(stack: WholeStack) -> Iterator[Graft]:
    with stack.client() as client:
        yield client


@pytest.fixture(scope="package")
def client(stack: WholeStack) -> Iterator[openai.OpenAI]:
    with stack.openai() as client:
        yield client


@pytest.fixture(scope="package")
def trained(
    stack: WholeStack, graft: Graft, client: openai.OpenAI, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    return train_two(stack, graft, client, tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="package")
def jobs(stack: WholeStack, graft: Graft, client: openai.OpenAI, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return train_all(stack, graft, client, tmp_path_factory.mktemp("methods"))
