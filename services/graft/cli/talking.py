"""`graft generate` and `graft chat`: asks a base model or an adapter, once or turn by turn."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graft.cli.connect import connect
from graft.cli.output import Json, JsonLines, as_dict, failures, print_failure, print_json, show_one
from graft.domain.errors import FieldViolation, GraftError, InvalidArgument

if TYPE_CHECKING:
    from graft.client import Graft

Model = Annotated[str, typer.Argument(help="base, base:adapter, base:adapter@version or base:adapter@alias.")]
MaxTokens = Annotated[
    int | None, typer.Option(help="Most tokens of an answer; when not given the task's for --input, else 128.")
]
Temperature = Annotated[
    float | None, typer.Option(help="When not given the task's for --input, else 0: always the likeliest token.")
]
TopP = Annotated[float | None, typer.Option(help="Nucleus: only the likeliest tokens with this mass together.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]


def add_to(app: typer.Typer) -> None:
    """Adds these commands to the main one."""
    app.command("generate")(generate)
    app.command("chat")(chat)


def generate(
    model: Model,
    prompt: Annotated[
        str | None, typer.Argument(help="Raw text to go on from; `-` reads it from standard input.")
    ] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", metavar="NAME=TEXT", help="A field of the task that MODEL was trained with; repeat."),
    ] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; repeat.")] = None,
    choice: Annotated[list[str] | None, typer.Option(help="Answer with one of these; repeat.")] = None,
    as_json: Json = False,
) -> None:
    """Continue a raw PROMPT, without a chat template, or answer the --input fields of MODEL's task."""
    with failures(as_json=as_json), connect() as graft:
        if (prompt is None) is not bool(inputs):
            raise InvalidArgument(
                "Give either a PROMPT (`-` reads it from standard input) or the fields of MODEL's task as --input "
                "NAME=TEXT.",
                reason="INVALID_INPUT",
            )
        answer = graft.generate(
            model,
            prompt=sys.stdin.read() if prompt == "-" else prompt,
            inputs=_named(inputs) if inputs else None,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=stop or [],
            choices=choice or [],
        )
        show_one(answer, answer.text, as_json=as_json)


def _named(inputs: list[str]) -> dict[str, str]:
    """`NAME=TEXT`s by name; `-` as a text reads it from standard input. Raises InvalidArgument."""
    named: dict[str, str] = {}
    for given in inputs:
        name, equals, text = given.partition("=")
        if not equals or not name or name in named:
            description = "was given already" if name in named else "is not NAME=TEXT"
            raise InvalidArgument(
                f"--input {given[:80]}: {description}.",
                reason="INVALID_VALUE",
                violations=(FieldViolation("input", description),),
            )
        named[name] = sys.stdin.read() if text == "-" else text
    return named


def chat(
    model: Model,
    message: Annotated[str | None, typer.Argument(help="Answer this and leave; without it, talk.")] = None,
    system: Annotated[str, typer.Option(help="Instruction before the first turn.")] = "",
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    as_json: JsonLines = False,
) -> None:
    """Talk to a model. Answers are printed as they come.

    Without MESSAGE each line of input is a turn. Ctrl-C stops an answer and, at the prompt, leaves; so does Ctrl-D.
    With --json each answer is one object, printed when it is complete.
    """
    sampling = {"max_tokens": max_tokens, "temperature": temperature}
    with failures(as_json=as_json), connect() as graft:
        talk = _Talk(graft, model, system, sampling, as_json=as_json)
        if message is not None:
            talk.ask(message)
            return
        alone = not sys.stdin.isatty()
        for text in _lines():
            try:
                talk.ask(text, may_stop=not alone)
            except GraftError as error:
                if alone or not talk.begun:
                    raise
                # The engine may be back soon, and a question that was too long can be asked more briefly.
                print_failure(error, as_json=as_json)


def _lines() -> Iterator[str]:
    """The lines of standard input that say something, with a prompt and line editing on a terminal."""
    prompt = ""
    if sys.stdin.isatty():
        with suppress(ImportError):  # not in every Python; gives `input` editing and history
            import readline  # noqa: F401
        prompt = "> "
        print("Ctrl-D leaves; Ctrl-C stops an answer.", file=sys.stderr)
    while True:
        try:
            text = input(prompt)
        except (EOFError, KeyboardInterrupt) as left:
            if prompt:
                print()
            if isinstance(left, KeyboardInterrupt):
                raise
            return
        if text.strip():
            yield text


class _Talk:
    """A conversation and its turns so far."""

    def __init__(self, graft: "Graft", model: str, system: str, sampling: Mapping[str, Any], *, as_json: bool) -> None:
        self._graft = graft
        self._model = model
        self._sampling = sampling
        self._as_json = as_json
        self._turns = [{"role": "system", "content": system}] if system else []

    @property
    def begun(self) -> bool:
        """True once a question was answered."""
        return any(turn["role"] == "assistant" for turn in self._turns)

    def ask(self, text: str, *, may_stop: bool = False) -> None:
        """Prints the answer and keeps both turns; a question without an answer is forgotten.

        With `may_stop` a Ctrl-C ends the answer only, and what came of it is kept.
        """
        turns = [*self._turns, {"role": "user", "content": text}]
        if self._as_json:
            answer = self._graft.generate(self._model, messages=turns, **self._sampling)
            print_json(as_dict(answer), line=True)
            said = answer.text
        else:
            said = self._stream(turns, may_stop=may_stop)
        if said:
            self._turns = [*turns, {"role": "assistant", "content": said}]

    def _stream(self, turns: list[dict[str, str]], *, may_stop: bool) -> str:
        pieces: list[str] = []
        try:
            for piece in self._graft.stream(self._model, messages=turns, **self._sampling):
                pieces.append(piece.text)
                print(piece.text, end="", flush=True)
        except KeyboardInterrupt:
            if not may_stop:
                raise
        finally:
            if pieces:
                print(flush=True)
        return "".join(pieces)
