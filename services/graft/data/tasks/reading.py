"""A task's definition from YAML or JSON to checked values. Remembers faults instead of raising at the first.

Scalars are read as the text that stands there: a label `yes` or `1` is that text, not a truth value or a number.
"""

import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

import yaml

from graft.data.tasks import sandbox
from graft.data.tasks.sandbox import LABELS
from graft.domain.errors import FieldViolation, InvalidArgument
from graft.domain.evaluations import METRICS
from graft.domain.names import check_id

KEYS = (
    "name", "version", "description", "fields", "completion", "labels", "system", "user", "prompt", "conversations",
    "metrics", "decoding",
)  # fmt: skip
MAX_FIELDS = 32
MAX_LABELS = 256
MAX_TEXTS = 64
_FIELD_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")
_TAKEN = frozenset(
    {LABELS, "loop", "and", "or", "not", "in", "is", "if", "else", "elif", "for", "true", "false", "none"}
)
_TAKEN |= {"True", "False", "None"}


def plain(text: str) -> Any:
    """Mappings, lists and texts. Raises ValueError saying what is not readable, and in which line."""
    if text.lstrip().startswith("{"):
        try:
            return _texts(json.loads(text, object_pairs_hook=_unique))
        except json.JSONDecodeError:
            pass  # a YAML mapping may begin so too
        except RecursionError:
            raise ValueError("is nested too deeply") from None
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{line}{error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"is not YAML: {error}") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None


class _Loader(yaml.BaseLoader):
    """Without aliases, which could make a small text huge, and without keys that occur twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]  # without types in types-pyyaml
            raise yaml.composer.ComposerError(None, None, "anchors and aliases are not read here", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} occurs twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else "")
        return super().construct_mapping(node, deep)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise ValueError(f"{key[:80]!r} occurs twice")
        made[key] = value
    return made


def _texts(value: Any) -> Any:
    """JSON as `_Loader` would have read it."""
    if isinstance(value, dict):
        return {key: _texts(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_texts(item) for item in value]
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)


def did_you_mean(name: str, known: Collection[str]) -> str:
    """`did you mean 'x'`, or all that is known."""
    near = get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}" if near else f"there are: {', '.join(known)}"


class Reader:
    """The parts of a definition, each checked as it is taken."""

    def __init__(self, read: Any) -> None:
        self.faults: list[FieldViolation] = []
        self._read: dict[str, Any] = {}
        if not isinstance(read, dict):
            self.fault("", f"is not a mapping of keys to values; keys: {', '.join(KEYS)}")
            return
        self._read = read
        self._known(read, KEYS, "")

    def fault(self, field: str, description: str) -> None:
        """Remembers one. An empty field is the definition itself."""
        self.faults.append(FieldViolation(field, description))

    def has(self, key: str) -> bool:
        """Whether the key stands there with something behind it."""
        return bool(self._read.get(key))

    def name(self) -> str:
        """The task's name."""
        name = self.text("name")
        try:
            return check_id(name, "name") if self.has("name") or not self._read else self._missing("name")
        except InvalidArgument as error:
            self.faults += error.violations
            return name

    def text(self, key: str) -> str:
        """A text; empty when it is not there."""
        value = self._read.get(key, "")
        if isinstance(value, str):
            return value
        self.fault(key, "is not a text")
        return ""

    def flag(self, key: str) -> bool:
        """`true` or `false`; false when it is not there."""
        return self._flag(self._read.get(key, "false"), key)

    def whole(
        self, key: str, least: int, most: int, *, default: int, within: tuple[Mapping[str, Any], str] | None = None
    ) -> int:
        """A whole number from `least` to `most`."""
        value: int = self._number(int, key, least, most, default, within)
        return value

    def number(
        self, key: str, least: float, most: float, *, default: float, within: tuple[Mapping[str, Any], str]
    ) -> float:
        """A number from `least` to `most`."""
        value: float = self._number(float, key, least, most, default, within)
        return value

    def texts(
        self, key: str, *, within: tuple[Mapping[str, Any], str] | None = None, most: int = MAX_TEXTS
    ) -> tuple[str, ...]:
        """A list of different texts, none of them empty."""
        values, field = self._place(key, within)
        given = values.get(key, [])
        given = [given] if isinstance(given, str) and given else given or []
        if not isinstance(given, list) or not all(isinstance(one, str) and one for one in given):
            self.fault(field, "is not a list of texts")
            return ()
        if len(given) > most:
            self.fault(field, f"has {len(given)} texts; {most} are allowed")
        for index, one in enumerate(given):
            if one in given[:index]:
                self.fault(f"{field}[{index}]", f"{one[:80]!r} stands there already")
        return tuple(given)

    def section(self, key: str, known: tuple[str, ...]) -> Mapping[str, Any]:
        """A mapping with some of the `known` keys; empty when it is not there."""
        value = self._read.get(key) or {}
        if not isinstance(value, dict):
            self.fault(key, f"is not a mapping; keys: {', '.join(known)}")
            return {}
        self._known(value, known, f"{key}.")
        return value

    def labels(self, from_data: str) -> tuple[str, ...] | str:
        """The labels, or the word that says that the data has them."""
        if self._read.get(LABELS) == from_data:
            return from_data
        if isinstance(self._read.get(LABELS), str) and self.has(LABELS):
            self.fault(LABELS, f"is neither a list of texts nor {from_data!r}, which takes them from the data")
            return ()
        labels = self.texts(LABELS, most=MAX_LABELS)
        if len(labels) == 1:
            self.fault(LABELS, "has one label; at least two are needed to choose from")
        first: dict[str, str] = {}
        for index, label in enumerate(labels):
            if first.setdefault(label.strip(), label) != label:
                other = first[label.strip()]
                self.fault(f"{LABELS}[{index}]", f"{label[:80]!r} differs from {other[:80]!r} in white space alone")
        return labels

    def metrics(self) -> tuple[str, ...]:
        """Names of metrics."""
        names = self.texts("metrics")
        for index, name in enumerate(names):
            if name not in METRICS:
                self.fault(f"metrics[{index}]", f"{name[:80]!r} is no metric; {did_you_mean(name, METRICS)}")
        return names

    def fields(self) -> Iterator[tuple[str, str, bool]]:
        """Name, description, and whether it is optional, of each input."""
        given = self._read.get("fields")
        if not given and self._read:
            self._missing("fields", ": name each input of the prompt, for example `review: The text to judge.`")
        if not isinstance(given, dict):
            if given:
                self.fault("fields", "is not a mapping of names to descriptions")
            return
        if len(given) > MAX_FIELDS:
            self.fault("fields", f"has {len(given)} fields; {MAX_FIELDS} are allowed")
        for name, value in given.items():
            where = f"fields.{str(name)[:80]}"
            if not isinstance(name, str) or not _FIELD_NAME.fullmatch(name) or name in _TAKEN:
                self.fault(where, "is no name of a field: use letters, digits and '_', and no word of the templates")
                continue
            if isinstance(value, str):
                yield name, value, False
            elif isinstance(value, dict):
                self._known(value, ("description", "optional"), f"{where}.")
                described = value.get("description", "")
                if not isinstance(described, str):
                    self.fault(f"{where}.description", "is not a text")
                    described = ""
                yield name, described, self._flag(value.get("optional", "false"), f"{where}.optional")
            else:
                self.fault(where, "is neither a description nor a mapping with `description` and `optional`")

    def completion(self, fields: list[str]) -> tuple[str, str]:
        """The field that holds the answer, and the template of it."""
        given = self._read.get("completion")
        if not given:
            if self._read:
                self._missing("completion", ": name the field of a row that holds the answer")
            return "", ""
        where = "completion"
        if isinstance(given, dict):
            self._known(given, ("field", "template"), "completion.")
            where = "completion.field"
        name = given.get("field", "") if isinstance(given, dict) else given
        template = given.get("template", "") if isinstance(given, dict) else ""
        if not isinstance(name, str) or not _FIELD_NAME.fullmatch(name) or name in _TAKEN:
            self.fault(where, "is no name of a field: use letters, digits and '_', and no word of the templates")
            return "", ""
        if name in fields:
            self.fault(where, f"{name!r} is an input too: the prompt would hold the answer")
        if not isinstance(template, str):
            self.fault("completion.template", "is not a text")
            return name, ""
        if template:
            self._check_template("completion.template", template, [*fields, name, LABELS])
            if not any(fault.field == "completion.template" for fault in self.faults) and (
                name not in sandbox.used(template)
            ):
                self.fault("completion.template", f"does not use {name!r}, the answer")
        return name, template

    def template(self, key: str, fields: list[str]) -> str:
        """A template of the prompt, over the fields and the labels."""
        source = self.text(key)
        if source:
            self._check_template(key, source, [*fields, LABELS])
        return source

    def _check_template(self, field: str, source: str, names: list[str]) -> None:
        for description in sandbox.check(source, names):
            self.fault(field, description)

    def _missing(self, key: str, more: str = "") -> str:
        self.fault(key, f"is missing{more}")
        return ""

    def _known(self, given: Mapping[Any, Any], known: tuple[str, ...], prefix: str) -> None:
        for key in given:
            if key not in known:
                shown = str(key)[:80]
                self.fault(f"{prefix}{shown}", f"is not a known key; {did_you_mean(shown, known)}")

    def _flag(self, value: Any, field: str) -> bool:
        if value in ("true", "false"):
            return bool(value == "true")
        self.fault(field, "is neither true nor false")
        return False

    def _place(self, key: str, within: tuple[Mapping[str, Any], str] | None) -> tuple[Mapping[str, Any], str]:
        return (self._read, key) if within is None else (within[0], f"{within[1]}.{key}")

    def _number(
        self,
        kind: Callable[[str], Any],
        key: str,
        least: float,
        most: float,
        default: float,
        within: tuple[Mapping[str, Any], str] | None,
    ) -> Any:
        values, field = self._place(key, within)
        given = values.get(key, "")
        if given == "":
            return default
        try:
            value = kind(given) if isinstance(given, str) else math.nan
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            self.fault(field, f"is not a {'whole ' if kind is int else ''}number from {least:g} to {most:g}")
            return default
        return value
