"""What a task is: its fields, its prompt, its completion, and what it is measured and decoded by.

Owns the form of a definition as text (YAML or JSON) and every fault that it can have. Rendering is
`graft.data.tasks.templates`; which tasks exist is `graft.data.tasks.catalog`.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import yaml

from graft.data.tasks.reading import Reader, plain
from graft.domain.errors import FieldViolation, InvalidArgument

MAX_DEFINITION_CHARACTERS = 8000
"""What a tag of MLflow holds; the definition is kept there with every version that it has trained."""


@dataclass(frozen=True)
class Field:
    """An input of the prompt."""

    name: str
    description: str = ""
    optional: bool = False
    """May be left out; the template then sees an empty text."""


@dataclass(frozen=True)
class Completion:
    """What is learned."""

    field: str
    """Field of a row that holds the answer."""
    template: str = ""
    """Of the completion's text, over the same fields; empty: the answer as it is."""


@dataclass(frozen=True)
class Decoding:
    """How answers are generated where a request does not say it."""

    max_tokens: int = 128
    temperature: float = 0.0
    stop: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    """The answer is one of these; none: any text."""
    choose_label: bool = False
    """The answer is one of the task's labels."""


@dataclass(frozen=True)
class TaskDefinition:
    """A task. Made by `load`, which leaves no faults in it."""

    name: str
    version: int
    fields: tuple[Field, ...]
    completion: Completion
    description: str = ""
    labels: tuple[str, ...] = ()
    labels_from_data: bool = False
    """The labels are those of the data set that is trained on; `with_labels` puts them in."""
    system: str = ""
    user: str = ""
    prompt: str = ""
    """Either this, raw text, or `user` with or without `system`: turns for the model's chat template."""
    conversations: bool = False
    """Rows that are whole chats are learned as they are, beside rows of fields."""
    metrics: tuple[str, ...] = ()
    decoding: Decoding = field(default_factory=Decoding)

    @property
    def is_chat(self) -> bool:
        """Whether the prompt is turns of a chat rather than raw text."""
        return not self.prompt

    @property
    def required(self) -> tuple[str, ...]:
        """Names of the fields that must be given."""
        return tuple(one.name for one in self.fields if not one.optional)

    @property
    def digest(self) -> str:
        """`sha256:<hex>` of everything that is in it, however it was written down."""
        return f"sha256:{hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()}"

    def with_labels(self, labels: tuple[str, ...]) -> "TaskDefinition":
        """The same task for these labels. Raises InvalidArgument where `load` would."""
        return load(replace(self, labels=labels, labels_from_data=False).to_text())

    def to_text(self) -> str:
        """YAML that `load` reads as this definition."""
        told: dict[str, Any] = {"name": self.name, "version": self.version, "description": self.description}
        told["fields"] = {one.name: _field(one) for one in self.fields}
        told["completion"] = self.completion.field
        if self.completion.template:
            told["completion"] = {"field": self.completion.field, "template": self.completion.template}
        told["labels"] = FROM_DATA if self.labels_from_data else list(self.labels)
        told |= {"system": self.system, "user": self.user, "prompt": self.prompt}
        told["conversations"] = self.conversations or ""
        told["metrics"] = list(self.metrics)
        told["decoding"] = _decoding(self.decoding)
        kept = {key: value for key, value in told.items() if value not in ("", [])}
        text: str = yaml.dump(
            kept, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=MAX_DEFINITION_CHARACTERS
        )
        return text


FROM_DATA = "auto"


def load(text: str) -> TaskDefinition:
    """Reads a definition.

    Raises InvalidArgument (INVALID_TASK) with every fault, each with its field and what to do about it.
    """
    if len(text) > MAX_DEFINITION_CHARACTERS:
        raise _invalid([FieldViolation("", f"has {len(text)} characters; {MAX_DEFINITION_CHARACTERS} are allowed")])
    try:
        read = plain(text)
    except ValueError as error:
        raise _invalid([FieldViolation("", str(error))]) from None
    reader = Reader(read)
    made = _task(reader)
    if reader.faults:
        raise _invalid(reader.faults)
    # What is stored is what `to_text` writes, which may be longer than what was given.
    if (size := len(made.to_text())) > MAX_DEFINITION_CHARACTERS:
        raise _invalid([FieldViolation("", f"has {size} characters as YAML; {MAX_DEFINITION_CHARACTERS} are allowed")])
    return made


def _invalid(faults: list[FieldViolation]) -> InvalidArgument:
    told = "; ".join(f"{fault.field}: {fault.description}" if fault.field else fault.description for fault in faults)
    return InvalidArgument(
        f"The task's definition is not usable: {told}.", reason="INVALID_TASK", violations=tuple(faults)
    )


def _task(reader: Reader) -> TaskDefinition:
    fields = tuple(Field(*described) for described in reader.fields())
    decoding = reader.section("decoding", ("max_tokens", "temperature", "stop", "choices"))
    choices = decoding.get("choices", ())
    labels = reader.labels(FROM_DATA)
    completion, template = reader.completion([one.name for one in fields])
    made = TaskDefinition(
        name=reader.name(),
        version=reader.whole("version", 1, 1_000_000, default=1),
        description=reader.text("description"),
        fields=fields,
        completion=Completion(completion, template),
        labels=() if isinstance(labels, str) else labels,
        labels_from_data=isinstance(labels, str),
        system=reader.template("system", [one.name for one in fields]),
        user=reader.template("user", [one.name for one in fields]),
        prompt=reader.template("prompt", [one.name for one in fields]),
        conversations=reader.flag("conversations"),
        metrics=reader.metrics(),
        decoding=Decoding(
            max_tokens=reader.whole("max_tokens", 1, 1_000_000, default=128, within=(decoding, "decoding")),
            temperature=reader.number("temperature", 0, 2, default=0.0, within=(decoding, "decoding")),
            stop=reader.texts("stop", within=(decoding, "decoding")),
            choices=() if choices == "labels" else reader.texts("choices", within=(decoding, "decoding")),
            choose_label=choices == "labels",
        ),
    )
    if made.decoding.choose_label and not labels:
        reader.fault("decoding.choices", "are the task's labels, and it has none: give `labels`")
    if not reader.has("user") and not reader.has("prompt"):
        reader.fault("user", "is missing: give `user` (and perhaps `system`) for a chat, or `prompt` for raw text")
    elif reader.has("prompt") and (reader.has("user") or reader.has("system")):
        reader.fault("prompt", "is raw text, and there are chat turns: give one or the other")
    if made.conversations and not made.is_chat:
        reader.fault("conversations", "are chats, and the prompt is raw text")
    return made


# Writing


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks, as people write them."""


def _write_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _write_text)


def _field(one: Field) -> Any:
    return {"description": one.description, "optional": True} if one.optional else one.description


def _decoding(decoding: Decoding) -> dict[str, Any]:
    told: dict[str, Any] = {"max_tokens": decoding.max_tokens, "temperature": decoding.temperature}
    if decoding.stop:
        told["stop"] = list(decoding.stop)
    if decoding.choose_label or decoding.choices:
        told["choices"] = "labels" if decoding.choose_label else list(decoding.choices)
    return told
