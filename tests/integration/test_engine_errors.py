"""What vLLM's handlers raise: a refusal is answered, a defect is raised for the replica's log."""

import json
from typing import Any

import pytest

from graft.internal.v1 import engine_pb2

pytestmark = pytest.mark.integration

COMPLETIONS = engine_pb2.ENDPOINT_COMPLETIONS
BODY = b'{"prompt": "x"}'


class _Handler:
    """In the place of vLLM's own."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def create_completion(self, _request: object) -> Any:
        raise self._error


def _engine(error: Exception) -> Any:
    from graft.serving.engine import Engine  # imports vLLM

    engine = object.__new__(Engine)
    engine._base_id = "tiny"
    engine._completion = _Handler(error)
    return engine


async def test_a_defect_is_raised_where_its_text_would_have_been_the_answer() -> None:
    engine = _engine(RuntimeError("/home/secret/weights is not mapped"))
    with pytest.raises(RuntimeError):
        await engine.generate(COMPLETIONS, BODY, None, "tiny")
    with pytest.raises(RuntimeError):
        _ = [piece async for piece in engine.stream(COMPLETIONS, BODY, None, "tiny")]


async def test_a_refusal_is_answered_with_its_reason() -> None:
    engine = _engine(ValueError("The prompt of graft-0a1b is too long."))
    whole = await engine.generate(COMPLETIONS, BODY, "graft-0a1b", "tiny:reviews")
    (piece,) = [piece async for piece in engine.stream(COMPLETIONS, BODY, "graft-0a1b", "tiny:reviews")]
    for answer in (whole, piece):
        assert answer.http_status == 400
        assert json.loads(answer.json())["error"]["message"] == "The prompt of tiny:reviews is too long."
