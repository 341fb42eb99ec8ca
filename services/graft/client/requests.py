"""Builds the contract's requests from plain arguments: shared by both clients, so that each stays a list of calls."""

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from graft.api.v1 import (
    adapter_service_pb2,
    dataset_service_pb2,
    fine_tuning_job_pb2,
    fine_tuning_service_pb2,
    generation_pb2,
    generation_service_pb2,
)
from graft.domain import names
from graft.domain.errors import FieldViolation, InvalidArgument

CHUNK_BYTES = 256 * 1024
"""Well under gRPC's 4 MiB message limit, large enough that overhead does not show."""


def upload(parent: str, path: Path, display_name: str) -> Iterator[dataset_service_pb2.UploadDatasetRequest]:
    """Header and chunks of a file. Raises InvalidArgument, before anything is sent, when it cannot be read."""
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed by the generator below
    except OSError as error:
        raise InvalidArgument(
            f"{path} cannot be read: {error.strerror}.",
            reason="UNREADABLE_FILE",
            violations=(FieldViolation("path", str(path)),),
        ) from None
    header = dataset_service_pb2.UploadDatasetRequest.Header(
        parent=parent, display_name=display_name or path.name, request_id=str(uuid.uuid4())
    )

    def parts() -> Iterator[dataset_service_pb2.UploadDatasetRequest]:
        with file:
            yield dataset_service_pb2.UploadDatasetRequest(header=header)
            while chunk := file.read(CHUNK_BYTES):
                yield dataset_service_pb2.UploadDatasetRequest(chunk=chunk)

    return parts()


def create_job(
    parent: str,
    base_model: str,
    training_dataset: str,
    *,
    validation_dataset: str = "",
    suffix: str = "",
    lora: Mapping[str, Any] | None = None,
    hyperparameters: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
    request_id: str = "",
) -> fine_tuning_service_pb2.CreateFineTuningJobRequest:
    """`lora` and `hyperparameters` have the field names of `LoraTuning` and `Hyperparameters`; both may be partial.

    Data sets are ids or resource names. Raises InvalidArgument for an unknown field or a value of the wrong type.
    """
    job = fine_tuning_job_pb2.FineTuningJob(
        base_model=base_model,
        training_dataset=dataset(parent, training_dataset),
        validation_dataset=dataset(parent, validation_dataset) if validation_dataset else "",
        suffix=suffix,
        supervised=fine_tuning_job_pb2.SupervisedMethod(),
        metadata=metadata,
    )
    job.lora.CopyFrom(_built("lora", fine_tuning_job_pb2.LoraTuning, **(lora or {})))
    job.hyperparameters.CopyFrom(
        _built("hyperparameters", fine_tuning_job_pb2.Hyperparameters, **(hyperparameters or {}))
    )
    return fine_tuning_service_pb2.CreateFineTuningJobRequest(
        parent=parent, fine_tuning_job=job, request_id=request_id or str(uuid.uuid4())
    )


def _built(field: str, message: Callable[..., Any], **values: Any) -> Any:
    """`message(**values)`. Raises InvalidArgument naming `field` for an unknown name or a value that does not fit."""
    try:
        return message(**values)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(
            f"{field}: {error}",
            reason="INVALID_VALUE",
            violations=(FieldViolation(field, str(error)),),
        ) from None


def dataset(parent: str, id_or_name: str) -> str:
    """Resource name of a data set."""
    return id_or_name if "/" in id_or_name else f"{parent}/datasets/{id_or_name}"


def job(parent: str, id_or_name: str) -> str:
    """Resource name of a job."""
    return id_or_name if "/" in id_or_name else f"{parent}/fineTuningJobs/{id_or_name}"


def deployment(parent: str, id_or_name: str) -> str:
    """Resource name of a deployment."""
    return id_or_name if "/" in id_or_name else f"{parent}/deployments/{id_or_name}"


def adapter(parent: str, model: str) -> str:
    """Resource name of the adapter of a `model`. Raises InvalidArgument for a base model."""
    parsed = names.parse_model(model)
    if parsed.adapter is None:
        raise InvalidArgument(f"{model!r} names a base model; write base:adapter.", reason="INVALID_NAME")
    return f"{parent}/baseModels/{parsed.base}/adapters/{parsed.adapter}"


def version(parent: str, model: str) -> str:
    """Resource name of the version, or alias, of a `model`."""
    parsed = names.parse_model(model)
    return f"{adapter(parent, model)}/versions/{parsed.version or parsed.alias}"


def alias(parent: str, model: str, name: str, number: int) -> adapter_service_pb2.SetAdapterAliasRequest:
    """Points `name` at version `number` of the adapter of `model`. Raises InvalidArgument."""
    request: adapter_service_pb2.SetAdapterAliasRequest = _built(
        "version",
        adapter_service_pb2.SetAdapterAliasRequest,
        name=adapter(parent, model),
        alias=name,
        version=number,
    )
    return request


def generate(
    parent: str,
    model: str,
    *,
    prompt: str | None = None,
    messages: Sequence[Mapping[str, str]] | None = None,
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: Sequence[str] = (),
    choices: Sequence[str] = (),
) -> generation_service_pb2.GenerateRequest:
    """Exactly one of `prompt` (raw text) and `messages` (role and content). Raises InvalidArgument otherwise, and for a
    number that does not fit its field."""
    if (prompt is None) == (messages is None):
        raise InvalidArgument("Give either a prompt or messages.", reason="INVALID_INPUT")
    request = generation_service_pb2.GenerateRequest(parent=parent, model=model)
    if prompt is not None:
        request.prompt = prompt
    else:
        for message in messages or ():
            request.chat.messages.append(generation_pb2.ChatMessage(role=message["role"], content=message["content"]))
    request.sampling.CopyFrom(
        _built(
            "sampling",
            generation_pb2.SamplingParameters,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=stop,
            choices=choices,
        )
    )
    return request
