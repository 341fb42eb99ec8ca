"""The body of `POST /v1/fine_tuning/jobs` to a JobSpec.

Types and names are checked here, all faults together; ranges and existence are the core's. What OpenAI's fields cannot
say is taken from `graft`, which clients send with `extra_body`:

    {"graft": {"lora": {"rank": 16, "alpha": 32, "dropout": 0.05, "target_modules": ["q_proj", "v_proj"]},
               "task": "sentiment", "from_adapter": "smollm2-135m:reviews@3",
               "sweep": {"learning_rates": [1e-4, 5e-4], "ranks": [4, 8], "max_trials": 3},
               "hyperparameters": {"max_steps": 100, "over_length_policy": "truncate"}}}

`graft.hyperparameters` takes every field of `graft.domain.jobs.Hyperparameters` by its name. `method.type` is OpenAI's
`supervised`, `dpo` or `reinforcement`, or Graft's `self_supervised` or `instruction`. What is tuned is LoRA, unless
`graft.tuning` says `last_layers` or `full`. A grader is `{"type": kind, …its settings}`.
"""

import difflib
import json
import math
from collections.abc import Callable
from enum import StrEnum
from typing import Any, TypeVar, get_args, get_type_hints

from graft.domain.errors import FieldViolation, GraftError, InvalidArgument
from graft.domain.grading import GraderSpec
from graft.domain.jobs import (
    Hyperparameters,
    JobSpec,
    LastLayers,
    Lora,
    LossOn,
    Method,
    OverLengthPolicy,
    Preference,
    Reinforcement,
    ServedAs,
    Sharding,
    Sweep,
    Tuning,
)
from graft.gateway.errors import MAX_VIOLATIONS

T = TypeVar("T")
EnumT = TypeVar("EnumT", bound=StrEnum)

AUTO = "auto"
_OPENAI = {
    "n_epochs": "epochs",
    "batch_size": "batch_size",
    "learning_rate_multiplier": "learning_rate_multiplier",
}
"""OpenAI's hyperparameters by Graft's names."""
METHODS = {
    "supervised": Method.SUPERVISED,
    "dpo": Method.PREFERENCE,
    "reinforcement": Method.REINFORCEMENT,
    "self_supervised": Method.SELF_SUPERVISED,
    "instruction": Method.INSTRUCTION,
}
"""OpenAI's `method.type`, and Graft's own."""
METHOD_TYPES = {method: name for name, method in METHODS.items()}
_PARAMS = {
    "base_model": "model",
    "training_dataset": "training_file",
    "validation_dataset": "validation_file",
    "method": "method.type",
}
"""Graft's fields by OpenAI's names, for refusals of the core."""
_GRAFT_SECTIONS = frozenset(
    {
        "hyperparameters",
        "lora",
        "last_layers",
        "served_as",
        "delta_rank",
        "task",
        "task_definition",
        "from_adapter",
        "sweep",
    }
)
"""Graft's fields that stand under `graft`."""


def job_spec(body: dict[str, object]) -> JobSpec:
    """What a client asked for. Raises InvalidArgument naming every field that is unknown or cannot be honoured."""
    faults: list[FieldViolation] = []
    top = _Object(body, "", faults)
    graft = top.object("graft")
    chosen = _Chosen(faults)
    method, preference, reinforcement = _read_method(top, graft, chosen)
    _read_openai(top.object("hyperparameters"), chosen)
    chosen.put("seed", top.take("seed", _whole), "seed")
    policies = _read_graft(graft.object("hyperparameters"), chosen)
    lora = graft.object("lora")
    last_layers = graft.object("last_layers")
    spec = JobSpec(
        base_model=top.required("model"),
        training_dataset=top.required("training_file"),
        validation_dataset=top.take("validation_file", _text),
        suffix=top.take("suffix", _text) or None,
        method=method,
        loss_on=graft.take("loss_on", _one_of(LossOn)) or LossOn.COMPLETION,
        preference=preference,
        reinforcement=reinforcement,
        tuning=graft.take("tuning", _one_of(Tuning)) or Tuning.LORA,
        lora=Lora(
            rank=lora.take("rank", _whole) or 0,
            alpha=lora.take("alpha", _number) or 0.0,
            dropout=lora.take("dropout", _number) or 0.0,
            target_modules=lora.take("target_modules", _texts) or (),
            use_rslora=lora.take("use_rslora", _yes_or_no) or False,
            use_dora=lora.take("use_dora", _yes_or_no) or False,
            modules_to_save=lora.take("modules_to_save", _texts) or (),
            base_quantization=lora.take("base_quantization", _quantization) or "",
        ),
        last_layers=LastLayers(
            blocks=last_layers.take("blocks", _whole) or 0,
            train_head=last_layers.take("train_head", _yes_or_no) or False,
        ),
        served_as=graft.take("served_as", _one_of(ServedAs)),
        delta_rank=graft.take("delta_rank", _whole) or 0,
        task=graft.take("task", _text) or "",
        task_definition=graft.take("task_definition", _definition) or "",
        from_adapter=graft.take("from_adapter", _text) or None,
        hyperparameters=Hyperparameters(**chosen.values, **policies),
        sweep=_read_sweep(graft),
        metadata=top.take("metadata", _pairs) or {},
    )
    if top.take("integrations", lambda value: value):
        faults.append(FieldViolation("integrations", "are not supported; every job is tracked in MLflow"))
    for read in (lora, last_layers, graft, top):
        read.finish()
    if faults:
        raise InvalidArgument(_sentences(faults), reason="INVALID_JOB", violations=tuple(faults))
    return spec


def in_openai_names(error: GraftError, body: dict[str, object]) -> GraftError:
    """A refusal of the core with its fields named as in `body`."""
    if not error.violations:
        return error
    faults = [FieldViolation(_param(fault.field, body), fault.description) for fault in error.violations]
    return type(error)(_sentences(faults), reason=error.reason, metadata=error.metadata, violations=tuple(faults))


def _sentences(faults: list[FieldViolation]) -> str:
    return " ".join(f"{fault.field}: {fault.description.rstrip('.')}." for fault in faults)


def _param(field: str, body: dict[str, object]) -> str:
    section, _, name = field.partition(".")
    if field == "reinforcement.grader":
        return "method.reinforcement.grader"
    if field == "preference.beta":
        return "method.dpo.hyperparameters.beta"
    if section not in _GRAFT_SECTIONS and section != "reinforcement":
        return _PARAMS.get(field, field)
    if section == "hyperparameters":
        if name == "seed" and body.get("seed") is not None:
            return "seed"
        openai = next((theirs for theirs, ours in _OPENAI.items() if ours == name), None)
        paths = [("method", name, "hyperparameters") for name in METHODS]
        for path in (("hyperparameters",), *paths):
            found: Any = body
            for key in path:
                found = found.get(key) if isinstance(found, dict) else None
            if openai and isinstance(found, dict) and found.get(openai) not in (None, AUTO):
                return ".".join((*path, openai))
    return f"graft.{field}"


# The parts of a body


class _Chosen:
    """Hyperparameters that were given, and where: one may be given twice, but not with two values."""

    def __init__(self, faults: list[FieldViolation]) -> None:
        self.values: dict[str, Any] = {}
        self._paths: dict[str, str] = {}
        self._faults = faults

    def put(self, name: str, value: float | None, path: str) -> None:
        if value is None:
            return
        if self.values.setdefault(name, value) != value:
            self._faults.append(FieldViolation(path, f"differs from {self._paths[name]}; give one of them"))
        self._paths.setdefault(name, path)


def _read_method(top: "_Object", graft: "_Object", chosen: _Chosen) -> tuple[Method | None, Preference, Reinforcement]:
    """None for a method that is not named: the data decides."""
    method = top.object("method")
    kind = method.take("type", _text)
    if kind is not None and kind not in METHODS:
        method.refuse("type", f"{kind!r} is not a method; use one of: {', '.join(METHODS)}")
        return None, Preference(), Reinforcement()
    own = method.object(kind) if kind else method
    preference, reinforcement = Preference(), Reinforcement()
    given = own.object("hyperparameters") if kind else None
    if kind == "dpo" and given is not None:
        preference = Preference(beta=given.take("beta", _or_auto(_number)) or 0.0)
    if kind == "reinforcement":
        more = graft.object("reinforcement")
        reinforcement = Reinforcement(
            grader=own.take("grader", _grader),
            group_size=more.take("group_size", _whole) or 0,
            max_completion_tokens=more.take("max_completion_tokens", _whole) or 0,
            temperature=more.take("temperature", _number) or 0.0,
            beta=more.take("beta", _number) or 0.0,
            epsilon=more.take("epsilon", _number) or 0.0,
        )
        more.finish()
    if given is not None:
        _read_openai(given, chosen)
        own.finish()
    method.finish()
    return METHODS[kind] if kind else None, preference, reinforcement


def _read_openai(given: "_Object", chosen: _Chosen) -> None:
    for theirs, ours in _OPENAI.items():
        kind: Callable[[object], float] = _whole if ours == "batch_size" else _number
        chosen.put(ours, given.take(theirs, _or_auto(kind)), given.path(theirs))
    given.finish()


def _read_graft(given: "_Object", chosen: _Chosen) -> dict[str, Any]:
    """What is no number, by its name; numbers are put into `chosen`."""
    policies = {
        "over_length_policy": given.take("over_length_policy", _one_of(OverLengthPolicy)) or OverLengthPolicy.DROP,
        "sharding": given.take("sharding", _one_of(Sharding)) or Sharding.AUTO,
    }
    for name, hint in get_type_hints(Hyperparameters).items():
        if name not in policies:
            kind: Callable[[object], float] = _number if float in get_args(hint) else _whole
            chosen.put(name, given.take(name, _or_auto(kind)), given.path(name))
    given.finish()
    return policies


def _read_sweep(graft: "_Object") -> Sweep | None:
    asked = graft.object("sweep")
    sweep = Sweep(
        learning_rates=asked.take("learning_rates", _many(_number)) or (),
        ranks=asked.take("ranks", _many(_whole)) or (),
        max_trials=asked.take("max_trials", _whole) or 0,
        grace_steps=asked.take("grace_steps", _whole) or 0,
        reduction_factor=asked.take("reduction_factor", _number) or 0.0,
        max_concurrent_trials=asked.take("max_concurrent_trials", _whole) or 0,
    )
    asked.finish()
    return sweep if graft.has("sweep") else None


# Values. Each returns the value or raises ValueError with what was expected.


def _text(value: object) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise ValueError("must be a string")
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("must be a number")
    return float(value)


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        raise ValueError("must be a whole number")
    return int(value)


def _many(kind: Callable[[object], T]) -> Callable[[object], tuple[T, ...]]:
    def read(value: object) -> tuple[T, ...]:
        if not isinstance(value, list):
            raise ValueError("must be a list of numbers")
        return tuple(kind(one) for one in value)

    return read


def _texts(value: object) -> tuple[str, ...]:
    if isinstance(value, str):  # PEFT takes 'all-linear' as a bare string
        return (_text(value),)
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ValueError("must be a list of strings")
    return tuple(_text(one) for one in value)


def _pairs(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(one, str) and "\0" not in one for one in value.values()):
        raise ValueError("must be an object whose values are strings")
    return value


def _one_of(kind: type[EnumT]) -> Callable[[object], EnumT]:
    def read(value: object) -> EnumT:
        try:
            return kind(str(value))
        except ValueError:
            raise ValueError(f"must be one of: {', '.join(kind)}") from None

    return read


def _yes_or_no(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _quantization(value: object) -> str:
    if value != "nf4":
        raise ValueError("must be 'nf4'")
    return "nf4"


def _definition(value: object) -> str:
    """A task as text, or as the object that the text would be."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else _text(value)


def _grader(value: object) -> GraderSpec:
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        raise ValueError("must be an object with a `type`, and that grader's settings")
    return GraderSpec(value["type"], {name: setting for name, setting in value.items() if name != "type"})


def _or_auto(kind: Callable[[object], T]) -> Callable[[object], T | None]:
    def read(value: object) -> T | None:
        try:
            return None if value == AUTO else kind(value)
        except ValueError as error:
            raise ValueError(f"{error}, or 'auto'") from None

    return read


class _Object:
    """A JSON object that is read field by field; `finish` refuses what nobody read."""

    def __init__(self, values: dict[str, object], name: str, faults: list[FieldViolation]) -> None:
        self._values = values
        self._name = name
        self._faults = faults
        self._known: list[str] = []

    def path(self, name: str) -> str:
        return f"{self._name}.{name}" if self._name else name

    def refuse(self, name: str, description: str) -> None:
        self._faults.append(FieldViolation(self.path(name), description))

    def take(self, name: str, kind: Callable[[object], T | None]) -> T | None:
        """The field's value; None when it is absent, null or at fault."""
        self._known.append(name)
        value = self._values.get(name)
        if value is None:
            return None
        try:
            return kind(value)
        except (ValueError, OverflowError) as error:
            self.refuse(name, str(error))
            return None

    def has(self, name: str) -> bool:
        return self._values.get(name) is not None

    def required(self, name: str) -> str:
        taken = self.take(name, _text)
        if not taken and self._values.get(name) in (None, ""):
            self.refuse(name, "is required")
        return taken or ""

    def object(self, name: str) -> "_Object":
        """The object in a field, empty when absent."""

        def kind(value: object) -> dict[str, object]:
            if not isinstance(value, dict):
                raise ValueError("must be an object")
            return value

        return _Object(self.take(name, kind) or {}, self.path(name), self._faults)

    def finish(self) -> None:
        unknown = [name for name in self._values if name not in self._known]
        for name in unknown[:MAX_VIOLATIONS]:
            close = difflib.get_close_matches(name[:80], self._known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(self._known)}"
            self.refuse(name[:80], f"is not a field here; {hint}")
        if (more := len(unknown) - MAX_VIOLATIONS) > 0:
            self._faults.append(FieldViolation(self._name or "body", f"has {more} more fields that are not known"))
