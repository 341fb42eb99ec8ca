"""What is wrong is refused at the door with what would be right, and nobody else notices."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest

from graft.api.v1 import (
    dataset_service_pb2,
    dataset_service_pb2_grpc,
    fine_tuning_job_pb2,
    fine_tuning_service_pb2,
    fine_tuning_service_pb2_grpc,
    generation_service_pb2,
    generation_service_pb2_grpc,
)
from graft.client import Graft
from graft.domain.errors import FailedPrecondition, GraftError, InvalidArgument, ResourceExhausted
from tests.support.tiny_jobs import TOO_LONG, Trained, known_to_the_gateway, publish, sums
from tests.support.whole_stack import WholeStack

pytestmark = pytest.mark.e2e


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize(
    ("model", "existing"),
    [
        ("nope", "tiny"),
        ("tiny:nope", "tiny:sums"),
        ("tiny:sums@99", "tiny:sums@1"),
        ("tiny:sums@nope", "tiny:sums@champion"),
    ],
)
def test_an_unknown_model_is_not_found_and_the_refusal_names_what_exists(
    stack: WholeStack, client: openai.OpenAI, model: str, existing: str
) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{stack.settings.gateway.grpc_port}") as channel:
        stub = generation_service_pb2_grpc.GenerationServiceStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            stub.Generate(generation_service_pb2.GenerateRequest(model=model, prompt="hello"))
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND
    assert repr(model) in refused.value.details()
    assert existing in refused.value.details()
    for stream in (False, True):
        with pytest.raises(openai.NotFoundError) as told:
            client.chat.completions.create(model=model, messages=[{"role": "user", "content": "hello"}], stream=stream)
        assert repr(model) in told.value.message
        assert existing in told.value.message


def test_an_unknown_data_set_is_not_found_and_the_refusal_names_what_exists(
    stack: WholeStack, client: openai.OpenAI
) -> None:
    # The newest: a refusal names twenty, and other tests have uploaded more than that.
    row = b'{"prompt": "a", "completion": "b"}\n'
    existing = client.files.create(file=("newest.jsonl", row), purpose="fine-tune").id
    job = fine_tuning_job_pb2.FineTuningJob(base_model="tiny", training_dataset="projects/default/datasets/ds-nope")
    with grpc.insecure_channel(f"127.0.0.1:{stack.settings.gateway.grpc_port}") as channel:
        calls: list[Callable[[], Any]] = [
            lambda: dataset_service_pb2_grpc.DatasetServiceStub(channel).GetDataset(
                dataset_service_pb2.GetDatasetRequest(name=job.training_dataset)
            ),
            lambda: fine_tuning_service_pb2_grpc.FineTuningServiceStub(channel).CreateFineTuningJob(
                fine_tuning_service_pb2.CreateFineTuningJobRequest(parent="projects/default", fine_tuning_job=job)
            ),
        ]
        for call in calls:
            with pytest.raises(grpc.RpcError) as refused:
                call()
            assert refused.value.code() is grpc.StatusCode.NOT_FOUND
            assert "'ds-nope'" in refused.value.details()
            assert existing in refused.value.details()
    with pytest.raises(openai.NotFoundError, match=f"'ds-nope'.*{existing}") as told:
        client.fine_tuning.jobs.create(model="tiny", training_file="ds-nope")
    assert told.value.param == "training_file"
    with pytest.raises(openai.NotFoundError, match=f"'ds-nope'.*{existing}"):
        client.files.retrieve("ds-nope")


def test_bad_lines_are_counted_the_first_twenty_listed_and_nothing_stored(
    graft: Graft, client: openai.OpenAI, tmp_path: Path
) -> None:
    good = [json.dumps(row) for row in sums(5)]
    file = tmp_path / "bad.jsonl"
    file.write_text("\n".join([*good, *['{"prompt": "no completion"}'] * 25]) + "\n")
    before = [data.name for data in graft.datasets()]
    with pytest.raises(InvalidArgument) as refused:
        graft.upload_dataset(file)
    assert refused.value.metadata["bad_lines"] == "25"
    assert [fault.field for fault in refused.value.violations] == [f"line {n}: completion" for n in range(6, 26)]
    with pytest.raises(openai.BadRequestError, match="25 of 30 lines are bad; nothing was stored"):
        client.files.create(file=file, purpose="fine-tune")
    assert [data.name for data in graft.datasets()] == before


@pytest.mark.parametrize(
    ("lora", "field"),
    [({"rank": 65}, "lora.rank"), ({"target_modules": ["q_proj", "lm_head"]}, "lora.target_modules[1]")],
)
def test_an_adapter_that_could_not_be_served_is_refused_before_it_trains(
    graft: Graft, client: openai.OpenAI, trained: Trained, lora: dict[str, object], field: str
) -> None:
    before = [job.name for job in graft.jobs()]
    with pytest.raises(InvalidArgument) as refused:
        graft.create_job("tiny", trained.data.name, lora=lora)
    assert [fault.field for fault in refused.value.violations] == [field]
    file = trained.data.name.rsplit("/", 1)[-1]
    with pytest.raises(openai.BadRequestError) as told:
        client.fine_tuning.jobs.create(model="tiny", training_file=file, extra_body={"graft": {"lora": lora}})
    assert told.value.param == f"graft.{field}"
    assert [job.name for job in graft.jobs()] == before


@pytest.mark.usefixtures("trained")
def test_a_prompt_longer_than_the_context_is_refused(graft: Graft, client: openai.OpenAI) -> None:
    for model in ("tiny", "tiny:sums"):
        with pytest.raises(InvalidArgument, match="512"):
            graft.generate(model, prompt=TOO_LONG)
        with pytest.raises(openai.BadRequestError, match="512"):
            client.completions.create(model=model, prompt=TOO_LONG)


def test_a_message_larger_than_the_limit_is_refused(graft: Graft, client: openai.OpenAI) -> None:
    large = "x" * (5 * 1024 * 1024)
    with pytest.raises(ResourceExhausted):
        graft.generate("tiny", prompt=large)
    with pytest.raises(openai.APIStatusError) as told:
        client.completions.create(model="tiny", prompt=large)
    assert told.value.status_code == 413
    assert "GRAFT_GATEWAY_MAX_MESSAGE_BYTES" in told.value.message
    assert graft.generate("tiny", prompt="hello", max_tokens=2).model == "tiny"


@pytest.mark.usefixtures("trained")
def test_damaged_adapter_files_fail_their_own_requests_and_the_engine_goes_on(
    stack: WholeStack, graft: Graft, client: openai.OpenAI, base_folder: Path, tmp_path: Path
) -> None:
    (before,) = graft.residency()
    core = stack.engine_core()
    # Damaged after it was registered, and registered as it is.
    changed = publish(stack, base_folder, tmp_path, "changed", seed=4)
    artifacts = stack.home / "mlflow" / "artifacts"
    (weights,) = artifacts.glob(f"*/{changed.mlflow_run_id}/artifacts/adapter/adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1000])
    cut = publish(stack, base_folder, tmp_path, "cut", seed=5, truncated_bytes=1000)
    for version, fault in ((changed, "have changed"), (cut, "is truncated")):
        known_to_the_gateway(graft, version)
        refusals: list[Callable[[], Any]] = [
            lambda model=version.model: graft.generate(model, prompt="hello"),  # type: ignore[misc]
            lambda model=version.model: graft.load_adapter(model),  # type: ignore[misc]
        ]
        for call in refusals:
            with pytest.raises(FailedPrecondition, match=fault):
                call()
        with pytest.raises(openai.ConflictError, match=fault):
            client.completions.create(model=version.model, prompt="hello")
        for model in ("tiny", "tiny:sums"):
            assert client.completions.create(model=model, prompt="hello", max_tokens=2).choices
    (after,) = graft.residency()
    assert after.engine_restarts == before.engine_restarts
    assert stack.engine_core() == core


def test_a_refusal_over_grpc_carries_its_reason(graft: Graft) -> None:
    with pytest.raises(GraftError) as refused:
        graft.generate("tiny:nope", prompt="hello")
    assert refused.value.reason == "ADAPTER_NOT_FOUND"
    assert refused.value.metadata["name"] == "tiny:nope"
