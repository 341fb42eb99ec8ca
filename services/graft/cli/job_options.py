"""The options of `graft tune create` as those of the SDK, and a job's form in words.

Knows the contract's messages, so that each of their fields can be set by name; does not know what a field is good for.
"""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graft.cli.tasks import is_definition, read_definition
from graft.domain.errors import FieldViolation, InvalidArgument
from graft.domain.jobs import Memory

if TYPE_CHECKING:
    from graft.api.v1.fine_tuning_job_pb2 import FineTuningJob
    from graft.client.requests import JobOptions


def job_options(settings: Sequence[str], *, method: str, tuning: str, task: str, grader: str) -> "JobOptions":
    """`NAME=VALUE`s and what the command's own options say. Raises InvalidArgument."""
    sections = _parsed(settings)
    options: JobOptions = {"tuning": tuning, "hyperparameters": sections.pop("", {})}
    for section, values in sections.items():
        if section == "lora":
            options["lora"] = values
        elif section == "last_layers":
            options["last_layers"] = values
        elif section == "grader":
            if not grader:
                raise _wrong(f"grader.{next(iter(values))}", "says nothing without --grader KIND")
        elif method and section != method:
            raise _wrong(f"{section}.{next(iter(values))}", f"says nothing when the method is {method}")
        else:
            method = section
            options["method_options"] = values
    if grader:
        if method not in ("", "reinforcement"):
            raise _wrong("grader", f"says nothing when the method is {method}")
        method = "reinforcement"
        own = {"grader": {"kind": grader, "settings": sections.get("grader", {})}}
        options["method_options"] = {**options.get("method_options", {}), **own}
    if method:
        options["method"] = method
    if is_definition(task):
        options["task_definition"] = read_definition(task)
    elif task:
        options["task"] = task
    return options


def what_it_does(job: "FineTuningJob") -> str:
    """`preference, LoRA, served as an adapter`."""
    words = {"lora": "LoRA", "last_layers": "the last layers", "full": "every parameter"}
    lora = job.lora
    kin = ("DoRA" if lora.use_dora else "rsLoRA" if lora.use_rslora else "") + (
        " (4-bit base)" * bool(lora.base_quantization)
    )
    served = {0: "", 1: "served as an adapter", 2: "served as a low-rank delta", 3: "served as a model of its own"}
    parts = [
        str(job.WhichOneof("method") or "").replace("_", "-"),
        kin.strip() or words.get(str(job.WhichOneof("tuning")), ""),
        served.get(job.served_as, ""),
        "the best of a sweep" if job.HasField("sweep") else "",
    ]
    return ", ".join(part for part in parts if part)


def memory_text(job: "FineTuningJob") -> str:
    """`3.8 GB (weights 0.5, …)`; empty where it was not estimated."""
    found = job.memory_estimate
    if not found.total_bytes:
        return ""
    return str(Memory(found.weights_bytes, found.gradients_bytes, found.optimizer_bytes, found.activations_bytes))


def _parsed(settings: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Values by section, hyperparameters in section ``. A grader's settings are JSON, or else text."""
    from graft.api.v1 import fine_tuning_job_pb2 as messages

    kinds: Mapping[str, Any] = {
        "": messages.Hyperparameters,
        "lora": messages.LoraTuning,
        "last_layers": messages.LastLayersTuning,
        "supervised": messages.SupervisedMethod,
        "preference": messages.PreferenceMethod,
        "reinforcement": messages.ReinforcementMethod,
    }
    found: dict[str, dict[str, Any]] = {}
    for setting in settings:
        path, equals, text = setting.partition("=")
        section, _, name = path.rpartition(".")
        if section == "grader" and equals:
            found.setdefault(section, {})[name] = _json_or_text(text)
            continue
        field = kinds[section].DESCRIPTOR.fields_by_name.get(name) if section in kinds else None
        if not equals or field is None or field.message_type is not None:
            known = [
                f"{kind}.{field.name}" if kind else field.name
                for kind, message in kinds.items()
                for field in message.DESCRIPTOR.fields
                if field.message_type is None
            ]
            raise _wrong(setting, f"use NAME=VALUE with one of: {', '.join(known)}")
        found.setdefault(section, {})[name] = _typed(setting, field, text)
    return found


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _typed(setting: str, field: Any, text: str) -> Any:
    if field.enum_type is not None:
        prefix = _common_prefix([value.name for value in field.enum_type.values])
        known = [value.name.removeprefix(prefix).lower() for value in field.enum_type.values if value.number]
        if text.lower() not in known:
            raise _wrong(setting, f"use one of: {', '.join(known)}")
        return f"{prefix}{text.upper()}"
    if field.cpp_type == field.CPPTYPE_STRING:
        return [part.strip() for part in text.split(",")]
    if field.cpp_type == field.CPPTYPE_BOOL:
        if text.lower() not in ("true", "false"):
            raise _wrong(setting, "use true or false")
        return text.lower() == "true"
    kind = float if field.cpp_type == field.CPPTYPE_DOUBLE else int
    try:
        return kind(text)
    except ValueError:
        raise _wrong(setting, f"{text!r} is not {'a number' if kind is float else 'a whole number'}") from None


def _common_prefix(names: Sequence[str]) -> str:
    """`LOSS_ON_` of an enum's names: protobuf's style guide puts the enum's own before each."""
    return next(name for name in names if name.endswith("UNSPECIFIED")).removesuffix("UNSPECIFIED")


def _wrong(setting: str, description: str) -> InvalidArgument:
    name = setting.partition("=")[0]
    return InvalidArgument(
        f"--set {setting}: {description}.",
        reason="INVALID_VALUE",
        violations=(FieldViolation(name, description),),
    )
