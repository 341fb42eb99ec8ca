"""One inference service for the modules of this folder, which run in alphabetical order: `test_service` ends it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.serving_stack import Stack, serving_stack
from tests.support.tiny_llama import make_tiny_llama


@pytest.fixture(scope="package")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of weights large enough for a policy to find something to learn from."""
    return make_tiny_llama(tmp_path_factory.mktemp("base"), initializer_range=0.1)


@pytest.fixture(scope="package")
def stack(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with serving_stack(tmp_path_factory.mktemp("stack"), base_folder=base) as stack:
        yield stack
