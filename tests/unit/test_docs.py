"""Every `graft …` command in the README and the documentation is one that the command has, with options that it has."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from graft.cli.job_options import job_options
from graft.cli.main import app
from graft.client import requests
from graft.data.formats import validate_file
from graft.data.questions import read_questions
from graft.data.tasks.catalog import builtin, names
from graft.data.tasks.definition import load
from graft.domain.resources import DatasetFormat

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
USAGE_ERROR = typer.BadParameter.__mro__[1]
"""What typer raises for every wrong command line; it has no public name for it."""
COMMAND = re.compile(r"^(?:\$ )?(?:\.venv/bin/)?graft (.+)$")
BLOCK = re.compile(r"^```(?:sh|console)?\n(.*?)^```", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"^cat > (\S+) <<'END'\n(.*?)^END$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:\$ )?graft [^`\n]+)`")


def words(line: str) -> list[str]:
    """Of the first command of a line: no comment, nothing behind a pipe or a redirection."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    found: list[str] = []
    for word in lexer:
        if not word.strip("|&;<>()"):
            break
        found.append(word)
    return found


def commands(text: str) -> Iterator[tuple[str, bool]]:
    """Each command, without `graft`, and whether it stands in a block: those are whole."""
    for block in BLOCK.findall(text):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            if found := COMMAND.match(line.strip()):
                yield found[1], True
    for inline in INLINE.findall(BLOCK.sub("", text)):
        if found := COMMAND.match(inline):
            yield found[1], False


def parsed(arguments: list[str]) -> dict[str, Any]:
    """The values of a command's parameters. Raises what typer does for a wrong one."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command, arguments = command.commands[arguments[0]], arguments[1:]
    values: dict[str, Any] = command.make_context("graft", arguments).params
    return values


def fault(arguments: list[str], *, whole: bool) -> str:
    """What is wrong with a command; empty when nothing is."""
    command: Any = typer.main.get_command(app)
    rest = list(arguments)
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        if rest[0] not in command.commands:
            return f"there is no command {rest[0]!r}"
        command = command.commands[rest.pop(0)]
    try:
        command.make_context("graft", rest)
    except typer.Exit:  # --help and --version
        return ""
    except USAGE_ERROR as error:
        absent = type(error).__name__ in ("MissingParameter", "NoArgsIsHelpError")
        return "" if absent and not whole else str(error)
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_the_documentation_exists(page: Path) -> None:
    faults = {
        f"graft {command}": found
        for command, whole in commands(page.read_text(encoding="utf-8"))
        if (found := fault(words(command), whole=whole))
    }
    assert not faults


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_page_with_commands_says_how_graft_comes_into_the_path(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    if any(whole for _, whole in commands(text)):
        assert "`. .venv/bin/activate`" in text.split("```")[0]


def test_a_command_that_does_not_exist_is_found() -> None:
    text = (
        "Run `graft tune sing`.\n```\ngraft tune create m d --suffix \\\n  x --loud  # a comment\ngraft compare\n```\n"
    )
    found = [fault(words(command), whole=whole) for command, whole in commands(text)]
    assert "--loud" in found[0]
    assert found[1]
    assert found[2] == "there is no command 'sing'"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_data_that_a_page_makes_is_what_its_commands_say(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        for name, content in FILE.findall(block):
            Path(name).write_text(content)
        for command, _ in commands(f"```\n{block}```\n"):
            arguments = words(command)
            if arguments[:2] != ["tune", "create"] and arguments[0] != "compare":
                continue
            given = parsed(arguments)
            method, tuning = given.get("method", ""), given.get("tuning", "lora")
            options = job_options(
                given["settings"] or [], method=method, tuning=tuning, task=given["task"], grader=given["grader"]
            )
            requests.create_job("projects/default", "base", "ds-1", **options)
            file = Path(given["dataset"])
            if not file.exists():
                assert file.name in ("rows.jsonl", "held-out.jsonl") or not file.suffix  # the reader's own, or an id
                continue
            declared = DatasetFormat(given["format"]) if given["format"] else None
            found = validate_file(file, declared).format
            task = builtin(options["task"]) if "task" in options else None
            task = load(options["task_definition"]) if "task_definition" in options else task
            read_questions(file, found, task, graded=bool(given["grader"]))


def test_every_built_in_task_has_a_page() -> None:
    assert {page.stem for page in (ROOT / "docs" / "tasks").glob("*.md")} == set(names())


def test_every_link_between_pages_leads_somewhere() -> None:
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in PAGES
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]
    assert not broken
