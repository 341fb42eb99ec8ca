import pytest

from graft.api.v1 import fine_tuning_job_pb2
from graft.domain.jobs import JobState


def test_every_job_state_of_the_domain_is_in_the_contract() -> None:
    names = set(fine_tuning_job_pb2.FineTuningJob.State.keys()) - {"STATE_UNSPECIFIED"}
    assert names == {f"STATE_{state}" for state in JobState}


@pytest.mark.parametrize(
    "service", ["dataset", "fine_tuning", "evaluation", "adapter", "generation", "base_model", "task"]
)
def test_every_public_service_has_stubs(service: str) -> None:
    module = __import__(f"graft.api.v1.{service}_service_pb2_grpc", fromlist=["*"])
    name = "".join(part.capitalize() for part in service.split("_")) + "Service"
    assert hasattr(module, f"{name}Servicer")
