"""Builds the contract's requests from plain arguments: shared by both clients, so that each stays a list of calls."""

import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict, Unpack

from graft.api.v1 import (
    adapter_service_pb2,
    dataset_pb2,
    dataset_service_pb2,
    evaluation_pb2,
    evaluation_service_pb2,
    fine_tuning_job_pb2,
    fine_tuning_service_pb2,
    generation_pb2,
    generation_service_pb2,
)
from graft.domain import names
from graft.domain.errors import FieldViolation, InvalidArgument


class CheckOptions(TypedDict, total=False):
    """What a check may say beside its data set. Data sets are ids or resource names."""

    validation_dataset: str
    context_tokens: int
    epochs: float
    task: str
    """For rows of named fields, as a job's."""
    task_definition: str
    """YAML."""


def validate_dataset(
    parent: str, name: str, base_model: str, **options: Unpack[CheckOptions]
) -> dataset_service_pb2.ValidateDatasetRequest:
    """Raises InvalidArgument for an unknown option, or a value that does not fit its field."""
    if held_out := options.get("validation_dataset", ""):
        options["validation_dataset"] = dataset(parent, held_out)
    request: dataset_service_pb2.ValidateDatasetRequest = _built(
        "validate",
        dataset_service_pb2.ValidateDatasetRequest,
        name=dataset(parent, name),
        base_model=base_model,
        **options,
    )
    return request


def dataset_format(name: str) -> dataset_pb2.DatasetFormat.ValueType:
    """The number of a format's name; of an empty one, unspecified. Raises InvalidArgument."""
    try:
        return dataset_pb2.DatasetFormat.Value(f"DATASET_FORMAT_{name.upper() or 'UNSPECIFIED'}")
    except ValueError:
        known = [format_name(number) for number in dataset_pb2.DatasetFormat.values() if number]
        raise InvalidArgument(
            f"{name!r} is not a format; use one of {', '.join(known)}.",
            reason="INVALID_FORMAT",
            violations=(FieldViolation("format", f"{name!r} is not a format"),),
        ) from None


def format_name(number: dataset_pb2.DatasetFormat.ValueType) -> str:
    """`question_answer` for DATASET_FORMAT_QUESTION_ANSWER."""
    return dataset_pb2.DatasetFormat.Name(number).removeprefix("DATASET_FORMAT_").lower()


class JobOptions(TypedDict, total=False):
    """What a job may say beside its base model and data; everything that is left out is derived.

    Mappings have the field names of the contract's message, and may be partial. Enums are their names' last word in
    lower case: `served_as="merged_model"`.
    """

    validation_dataset: str
    """Id or resource name."""
    suffix: str
    method: str
    """`supervised`, `self_supervised`, `instruction`, `preference` or `reinforcement`; else as the data says."""
    method_options: Mapping[str, Any]
    """Of `SupervisedMethod`, `PreferenceMethod` and so on: `{"beta": 0.1}`. Needs `method`."""
    tuning: str
    """`lora`, `last_layers` or `full`; LoRA when left out."""
    lora: Mapping[str, Any]
    last_layers: Mapping[str, Any]
    served_as: str
    """`adapter`, `low_rank_delta` or `merged_model`."""
    delta_rank: int
    task: str
    task_definition: str
    """YAML."""
    from_adapter: str
    """`base:adapter@version`."""
    hyperparameters: Mapping[str, Any]
    sweep: Mapping[str, Any]
    """Of `Sweep`: `{"learning_rates": [1e-4, 5e-4], "ranks": [4, 8]}`; empty for one whose values are derived."""
    metadata: Mapping[str, str]
    request_id: str
    """A UUID4; one is made when left out."""


METHODS: dict[str, Callable[..., Any]] = {
    "supervised": fine_tuning_job_pb2.SupervisedMethod,
    "self_supervised": fine_tuning_job_pb2.SelfSupervisedMethod,
    "instruction": fine_tuning_job_pb2.InstructionMethod,
    "preference": fine_tuning_job_pb2.PreferenceMethod,
    "reinforcement": fine_tuning_job_pb2.ReinforcementMethod,
}
TUNINGS: dict[str, Callable[..., Any]] = {
    "lora": fine_tuning_job_pb2.LoraTuning,
    "last_layers": fine_tuning_job_pb2.LastLayersTuning,
    "full": fine_tuning_job_pb2.FullTuning,
}
SERVED_AS = ("adapter", "low_rank_delta", "merged_model")


def create_job(
    parent: str, base_model: str, training_dataset: str, **options: Unpack[JobOptions]
) -> fine_tuning_service_pb2.CreateFineTuningJobRequest:
    """Data sets are ids or resource names. Raises InvalidArgument for an unknown field or a value of the wrong type."""
    unknown = sorted(options.keys() - JobOptions.__annotations__.keys())
    if unknown:
        raise _invalid(unknown[0], f"is not an option of a job; use: {', '.join(JobOptions.__annotations__)}")
    validation = options.get("validation_dataset", "")
    job: fine_tuning_job_pb2.FineTuningJob = _built(
        "fine_tuning_job",
        fine_tuning_job_pb2.FineTuningJob,
        base_model=base_model,
        training_dataset=dataset(parent, training_dataset),
        validation_dataset=dataset(parent, validation) if validation else "",
        suffix=options.get("suffix", ""),
        task=options.get("task", ""),
        task_definition=options.get("task_definition", ""),
        from_adapter=options.get("from_adapter", ""),
        delta_rank=options.get("delta_rank", 0),
        metadata=options.get("metadata"),
    )
    method = options.get("method", "")
    if method:
        made = _chosen("method", METHODS, method, options.get("method_options", {}))
        getattr(job, method).CopyFrom(made)
    elif options.get("method_options"):
        raise _invalid("method_options", "say nothing without a method; name one")
    tuning = options.get("tuning", "lora")
    own = {"lora": options.get("lora"), "last_layers": options.get("last_layers")}
    for name, values in own.items():
        if values and name != tuning:
            raise _invalid(name, f"says nothing when the tuning is {tuning!r}")
    getattr(job, tuning if tuning in TUNINGS else "lora").CopyFrom(
        _chosen("tuning", TUNINGS, tuning, own.get(tuning) or {})
    )
    if served_as := options.get("served_as", ""):
        if served_as not in SERVED_AS:
            raise _invalid("served_as", f"{served_as!r} is none of: {', '.join(SERVED_AS)}")
        job.served_as = fine_tuning_job_pb2.ServedAs.Value(f"SERVED_AS_{served_as.upper()}")
    job.hyperparameters.CopyFrom(
        _built("hyperparameters", fine_tuning_job_pb2.Hyperparameters, **options.get("hyperparameters", {}))
    )
    if (sweep := options.get("sweep")) is not None:
        job.sweep.CopyFrom(_built("sweep", fine_tuning_job_pb2.Sweep, **sweep))
    return fine_tuning_service_pb2.CreateFineTuningJobRequest(
        parent=parent, fine_tuning_job=job, request_id=options.get("request_id") or str(uuid.uuid4())
    )


class EvaluationOptions(TypedDict, total=False):
    """What an evaluation may say beside its data and contestants. Data sets are ids or resource names."""

    metrics: Sequence[str]
    task: str
    task_definition: str
    """YAML."""
    grader: Mapping[str, Any]
    """`{"kind": …, "settings": {…}}`."""
    shots_dataset: str
    max_rows: int
    samples: int
    max_tokens: int
    display_name: str
    request_id: str


def create_evaluation(
    parent: str,
    dataset_name: str,
    contestants: Sequence[str | tuple[str, int]],
    **options: Unpack[EvaluationOptions],
) -> evaluation_service_pb2.CreateEvaluationRequest:
    """Raises InvalidArgument for an unknown option or a value of the wrong type."""
    unknown = sorted(options.keys() - EvaluationOptions.__annotations__.keys())
    if unknown:
        known = ", ".join(EvaluationOptions.__annotations__)
        raise _invalid(unknown[0], f"is not an option of an evaluation; use: {known}")
    given = {name: value for name, value in options.items() if name not in ("request_id", "shots_dataset")}
    if shots := options.get("shots_dataset", ""):
        given["shots_dataset"] = dataset(parent, shots)
    pairs = [(one, 0) if isinstance(one, str) else one for one in contestants]
    made = _built(
        "evaluation",
        evaluation_pb2.Evaluation,
        dataset=dataset(parent, dataset_name),
        contestants=[_built("contestants", evaluation_pb2.Contestant, model=one, shots=shots) for one, shots in pairs],
        **given,
    )
    return evaluation_service_pb2.CreateEvaluationRequest(
        parent=parent, evaluation=made, request_id=options.get("request_id") or str(uuid.uuid4())
    )


def evaluation(parent: str, id_or_name: str) -> str:
    """Resource name of an evaluation."""
    return id_or_name if "/" in id_or_name else f"{parent}/evaluations/{id_or_name}"


def _chosen(field: str, kinds: Mapping[str, Callable[..., Any]], name: str, values: Mapping[str, Any]) -> Any:
    if name not in kinds:
        raise _invalid(field, f"{name!r} is none of: {', '.join(kinds)}")
    return _built(name, kinds[name], **values)


def _invalid(field: str, description: str) -> InvalidArgument:
    return InvalidArgument(
        f"{field}: {description}.", reason="INVALID_VALUE", violations=(FieldViolation(field, description),)
    )


def _built(field: str, message: Callable[..., Any], **values: Any) -> Any:
    """`message(**values)`. Raises InvalidArgument naming `field` for an unknown name or a value that does not fit."""
    try:
        return message(**values)
    except (TypeError, ValueError) as error:
        raise _invalid(field, str(error)) from None


def dataset(parent: str, id_or_name: str) -> str:
    """Resource name of a data set."""
    return id_or_name if "/" in id_or_name else f"{parent}/datasets/{id_or_name}"


def job(parent: str, id_or_name: str) -> str:
    """Resource name of a job."""
    return id_or_name if "/" in id_or_name else f"{parent}/fineTuningJobs/{id_or_name}"


def task(parent: str, name: str) -> str:
    """Resource name of a task."""
    return name if "/" in name else f"{parent}/tasks/{name}"


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
    inputs: Mapping[str, str] | None = None,
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: Sequence[str] = (),
    choices: Sequence[str] = (),
) -> generation_service_pb2.GenerateRequest:
    """Exactly one of `prompt` (raw text), `messages` (role and content) and `inputs` (the texts of a task's fields).
    Raises InvalidArgument otherwise, and for a value that does not fit its field."""
    if sum(given is not None for given in (prompt, messages, inputs)) != 1:
        raise InvalidArgument("Give either a prompt or messages, or the inputs of a task.", reason="INVALID_INPUT")
    request: generation_service_pb2.GenerateRequest = _built(
        "prompt", generation_service_pb2.GenerateRequest, parent=parent, model=model, prompt=prompt
    )
    if inputs is not None:
        request.inputs.CopyFrom(_built("inputs", generation_pb2.TaskInputs, values=inputs))
    for message in messages or ():
        request.chat.messages.append(_built("messages", generation_pb2.ChatMessage, **message))
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
