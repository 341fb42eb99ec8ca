"""The part of Jinja that prompts are written in, and the proof that a template of it ends soon and reaches nothing.

A template is text with `{{ field }}`, slices, a few filters, `if`, and `for` over labels. Everything else is refused
when the template is read, before Jinja compiles it (its optimizer would compute `'x' * 10**9`): no calls, no
attributes, no arithmetic, no assignments, no macros, no nested loops. What is left is linear in text and labels.
Jinja's own immutable sandbox stands behind that as a second wall, and no loader, so that nothing can be included.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from graft.domain.errors import InvalidArgument

MAX_TEMPLATE_BYTES = 16 * 1024
MAX_TEXT_CHARACTERS = 1024 * 1024
"""Of all that is put in, of a filter's result, and of what comes out: as long as a row of a data set may be."""
MAX_WORK_CHARACTERS = 16 * 1024 * 1024
"""Filters, comparisons and slices of a rendering, times the characters put in: at most some tenths of a second, and
thousands of them for a text of a few pages."""
MAX_DEPTH = 20
"""Of expressions and blocks in each other. Python compiles no more than 100 blocks, and people read fewer."""
LABELS = "labels"
"""The one name that is a list."""

Values = Mapping[str, str | tuple[str, ...]]


class _TooMuch(Exception):
    """A limit was passed while rendering; the message ends a sentence that begins with the template."""


def check(source: str, names: Collection[str], lists: Collection[str] = (LABELS,)) -> list[str]:
    """What is wrong with a template that may use `names`, of which `lists` are lists. Empty when it is good."""
    try:
        template = _compiled(source)
    except _Faults as error:
        return list(error.args[0])
    unknown = [name for name in template.names if name not in names]
    if unknown:
        known = ", ".join(names)
        return [
            f"line {template.names[name]}: uses {name!r}, which is not declared; declared: {known}" for name in unknown
        ]
    for size in (0, 2):  # optional fields are empty where they are left out
        try:
            _rendered(source, {name: ("a", "b")[:size] if name in lists else "text"[: 2 * size] for name in names})
        except _FAILURES as error:
            return [f"cannot be rendered: {error}"]
    return []


def used(source: str) -> frozenset[str]:
    """The names that a good template uses."""
    return frozenset(_compiled(source).names)


def render(source: str, values: Values) -> str:
    """The text of a template that `check` finds nothing wrong with.

    Raises InvalidArgument: TEMPLATE_TOO_LARGE when a limit is passed, TEMPLATE_FAILED when it cannot be rendered.
    """
    try:
        return _rendered(source, values)
    except _TooMuch as error:
        raise InvalidArgument(f"The template {error}.", reason="TEMPLATE_TOO_LARGE") from None
    except (_Faults, *_FAILURES) as error:
        raise InvalidArgument(f"The template cannot be rendered: {error}", reason="TEMPLATE_FAILED") from None


def _rendered(source: str, values: Values) -> str:
    template = _compiled(source)
    given = sum(len(value) for value in values.values() if isinstance(value, str))
    repeated = max((len(value) for value in values.values() if isinstance(value, tuple)), default=0)
    if given > MAX_TEXT_CHARACTERS:
        raise _TooMuch(f"is given {given} characters; {MAX_TEXT_CHARACTERS} are allowed")
    if (template.work + template.repeated_work * repeated) * given > MAX_WORK_CHARACTERS:
        raise _TooMuch("filters, slices or compares so long a text too often")
    pieces: list[str] = []
    size = 0
    for piece in template.compiled.generate(dict(values)):
        size += len(piece)
        if size > MAX_TEXT_CHARACTERS:
            raise _TooMuch(f"makes more than {MAX_TEXT_CHARACTERS} characters")
        pieces.append(piece)
    return "".join(pieces)


# Filters


def _join(values: Sequence[str], separator: str = "") -> str:
    if isinstance(values, str):
        raise TypeError("join takes a list, such as the labels, not a text")
    return separator.join(values)


def _replace(text: str, old: str, new: str) -> str:
    if not old:
        raise ValueError("replace needs a text to look for")
    _check_size(len(text) + text.count(old) * (len(new) - len(old)))
    return text.replace(old, new)


def _check_size(characters: int) -> None:
    if characters > MAX_TEXT_CHARACTERS:
        raise _TooMuch(f"makes more than {MAX_TEXT_CHARACTERS} characters")


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    def filtered(*arguments: Any) -> Any:
        result = function(*arguments)
        if isinstance(result, str):
            _check_size(len(result))
        return result

    return filtered


_FILTERS: dict[str, Callable[..., Any]] = {
    "trim": str.strip,
    "lower": str.lower,
    "upper": str.upper,
    "capitalize": str.capitalize,
    "title": str.title,
    "length": len,
    "default": lambda value, instead="": value or instead,
    "replace": _replace,
    "join": _join,
    "tojson": lambda value: json.dumps(value, ensure_ascii=False),
}
FILTERS = tuple(_FILTERS)
_LOOP = ("index", "index0", "first", "last", "length")
_FAILURES = (_TooMuch, jinja2.TemplateError, TypeError, ValueError, AttributeError, LookupError)

# Blocks leave no lines of their own, as in Hugging Face's chat templates; `+%}` keeps the line break after one.
_environment = ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, cache_size=0
)
_environment.globals.clear()
_environment.filters.clear()
_environment.filters.update({name: _bounded(function) for name, function in _FILTERS.items()})
_environment.tests.clear()


# Reading


class _Faults(Exception):
    """Everything that is wrong with a template, as sentences."""


@dataclass(frozen=True)
class _Compiled:
    compiled: jinja2.Template
    names: Mapping[str, int]
    """Those that it uses, and the line of the first use."""
    work: int
    """Operations whose time grows with the text that they are given."""
    repeated_work: int
    """The same, of those that are done for each label."""


@lru_cache(maxsize=256)
def _compiled(source: str) -> _Compiled:
    if len(source.encode("utf-8", "replace")) > MAX_TEMPLATE_BYTES:
        raise _Faults([f"is longer than {MAX_TEMPLATE_BYTES} bytes"])
    try:
        tree = _environment.parse(source)
    except jinja2.TemplateSyntaxError as error:
        raise _Faults([f"line {error.lineno}: {error.message}"]) from None
    except RecursionError:
        raise _Faults(["line 1: is nested too deeply"]) from None
    except (ValueError, OverflowError) as error:
        raise _Faults([f"has a number that cannot be read: {error}"]) from None
    reader = _Reader()
    faults = dict.fromkeys(reader.faults(tree, depth=0, variables={}, repeated=False))
    if faults:
        raise _Faults(list(faults))
    return _Compiled(_environment.from_string(tree), reader.names, reader.work, reader.repeated_work)


class _Reader:
    """Walks a template's tree: what is not allowed, which names are used, how much work it is."""

    _PLAIN = (
        nodes.Template, nodes.Output, nodes.TemplateData, nodes.Const, nodes.If, nodes.And, nodes.Or, nodes.Not,
        nodes.Compare, nodes.Operand, nodes.Tuple, nodes.List, nodes.Slice, nodes.Keyword,
    )  # fmt: skip
    _TEXT_WORK = (nodes.Filter, nodes.Compare, nodes.Getitem)

    def __init__(self) -> None:
        self.names: dict[str, int] = {}
        self.work = 0
        self.repeated_work = 0

    def faults(self, node: nodes.Node, depth: int, variables: Mapping[str, str], repeated: bool) -> Iterator[str]:
        """`variables` are those of the loop around the node, if there is one."""
        if depth > MAX_DEPTH:
            yield f"line {node.lineno}: is nested too deeply"
            return
        if isinstance(node, nodes.For):
            yield from self._for(node, depth, repeated)
            return
        if isinstance(node, self._TEXT_WORK) and any(name.name not in variables for name in node.find_all(nodes.Name)):
            operations = len(node.ops) if isinstance(node, nodes.Compare) else 1
            self.work += 0 if repeated else operations
            self.repeated_work += operations if repeated else 0
        if fault := self._fault(node, variables):
            yield f"line {node.lineno}: {fault}"
            return
        if isinstance(node, nodes.Getattr):
            return  # `loop.last`: known, and without anything below it to look at
        for child in node.iter_child_nodes():
            yield from self.faults(child, depth + 1, variables, repeated)

    def _fault(self, node: nodes.Node, variables: Mapping[str, str]) -> str | None:
        if isinstance(node, nodes.Name):
            if node.name not in variables:
                self.names.setdefault(node.name, node.lineno)
            return None
        if isinstance(node, nodes.Filter):
            if node.node is None or node.name not in _FILTERS:
                return f"there is no filter {node.name!r} here; there are: {', '.join(FILTERS)}"
            return "filters take their arguments without names" if node.kwargs or node.dyn_kwargs else None
        if isinstance(node, nodes.CondExpr):
            return None if node.expr2 is not None else "`… if …` needs an `else`, for example `else ''`"
        if isinstance(node, nodes.Getattr):
            inner = node.node
            if isinstance(inner, nodes.Name) and inner.name == "loop" and "loop" in variables and node.attr in _LOOP:
                return None
            return f"has no attribute {node.attr!r}: only `loop.{'`, `loop.'.join(_LOOP)}` exist, inside a `for`"
        if isinstance(node, nodes.Getitem):
            return (
                None if _is_plain_slice(node.arg) else "what stands in [] must be a slice of whole numbers, as [:2000]"
            )
        if isinstance(node, nodes.Neg):
            return None if isinstance(node.node, nodes.Const) else "no arithmetic is done in a prompt"
        if isinstance(node, self._PLAIN):
            return None
        return _NOT_ALLOWED.get(type(node).__name__, f"{type(node).__name__} is not allowed; {_ALLOWED}")

    def _for(self, node: nodes.For, depth: int, repeated: bool) -> Iterator[str]:
        where = f"line {node.lineno}: "
        if repeated:
            yield where + "a loop within a loop is not allowed"
        elif not isinstance(node.iter, nodes.Name) or node.iter.name != LABELS:
            yield where + f"a loop goes over `{LABELS}` and nothing else"
        elif not isinstance(node.target, nodes.Name):
            yield where + f"a loop over `{LABELS}` has one variable"
        elif node.recursive or node.test is not None or node.else_:
            yield where + "a loop is neither recursive nor has a condition or an `else`"
        else:
            self.names.setdefault(LABELS, node.lineno)
            variables = {node.target.name: "", "loop": ""}
            for child in node.body:
                yield from self.faults(child, depth + 1, variables, repeated=True)


def _is_plain_slice(node: nodes.Node) -> bool:
    if not isinstance(node, nodes.Slice):
        return False
    parts = [node.start, node.stop, node.step]
    numbers = [part.node if isinstance(part, nodes.Neg) else part for part in parts if part is not None]
    return all(isinstance(part, nodes.Const) and type(part.value) is int for part in numbers)


_ALLOWED = "a prompt has `{{ field }}`, slices, filters, `if`, and `for` over labels"
_NO_ARITHMETIC = f"no arithmetic is done in a prompt; {_ALLOWED}"
_NOT_ALLOWED = {
    "Call": f"nothing can be called; {_ALLOWED}",
    "Concat": "write `{{ a }}{{ b }}` instead of `a ~ b`",
    "Test": "tests (`is …`) are not known: a field that is left out is empty, so write `{% if field %}`",
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "FloorDiv", "Mod", "Pow", "Pos"), _NO_ARITHMETIC),
    **dict.fromkeys(("Include", "Import", "FromImport", "Extends"), "nothing can be included: a prompt is one file"),
}
