"""What an application beside the first may take, and what it is called."""

import dataclasses

import pytest

from graft.domain.errors import InvalidArgument, ResourceExhausted
from graft.serving.applications import GIB, PROCESSES_BYTES, Applications, check_memory
from tests.support.gateways import base_model

MODEL = dataclasses.replace(base_model(), id="large", size_bytes=3 * GIB)


def test_a_model_that_does_not_fit_is_refused_with_the_numbers() -> None:
    needed = 6 * GIB + 2 * GIB + PROCESSES_BYTES
    check_memory(MODEL, 2, needed)
    with pytest.raises(ResourceExhausted) as refused:
        check_memory(MODEL, 2, needed - 1)
    assert "takes 9.5 GiB (2 x 3.0 of weights, 2 of KV cache, 1.5 of processes), and 9.5 GiB are available" in str(
        refused.value
    )
    assert refused.value.metadata == {"needed_bytes": str(needed), "available_bytes": str(needed - 1)}


async def test_the_first_application_cannot_be_deployed_or_undeployed() -> None:
    applications = Applications("first", 1, build=lambda _: pytest.fail("nothing may be built"))
    with pytest.raises(InvalidArgument):
        await applications.deploy(dataclasses.replace(MODEL, id="first"))
    for base in ("first", ""):
        with pytest.raises(InvalidArgument):
            await applications.undeploy(base)
