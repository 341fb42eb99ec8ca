"""`graft models`: base models. Lists those that a gateway offers; shows, adds, pulls and derives those of this home."""

import re
import sys
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graft.cli import deploying
from graft.cli.connect import connect
from graft.cli.deriving import Deriving
from graft.cli.output import Json, JsonLines, console, failures, print_json, print_table, show, size_text
from graft.cli.signals import cleaned_up

if TYPE_CHECKING:
    from graft.settings import Settings

Name = Annotated[str, typer.Argument(metavar="NAME", help="A base model of the catalogue.")]


class Choice(StrEnum):
    """How `derive` chooses the layers to keep."""

    ANGLE = "angle"
    EVEN = "even"


models = typer.Typer(invoke_without_command=True, help="List base models, and add to them.")


deploying.add_to(models)


@models.callback()
def every(context: typer.Context, as_json: Json = False) -> None:
    """List base models: what can be fine-tuned and asked. The subcommands add to them."""
    if context.invoked_subcommand is None:
        models_list(as_json=as_json)


@models.command("list")
def models_list(
    as_json: Json = False,
    local: Annotated[bool, typer.Option("--local", help="This home's catalogue, and what is not ready too.")] = False,
) -> None:
    """List base models: what can be fine-tuned and asked."""
    if local:
        with failures(as_json=as_json):
            _list_local(as_json=as_json)
        return
    with failures(as_json=as_json), connect() as graft:
        columns: dict[str, Callable[..., object]] = {
            "MODEL": lambda m: m.model,
            "PARAMETERS": lambda m: f"{m.parameter_count / 1e6:.0f}M",
            "SIZE": lambda m: size_text(m.size_bytes),
            "CONTEXT": lambda m: f"{m.context_tokens} tokens",
            "LICENCE": lambda m: m.license,
            "SERVED": lambda m: "yes" if m.served else "no",
        }
        show(graft.base_models(), columns, as_json=as_json, none="No base model is ready yet.")


@models.command("show")
def models_show(name: Name, as_json: Json = False) -> None:
    """Show one entry of this home's catalogue: source, licence, size, digest, lineage. Needs no stack."""
    from graft.registry.catalog import entry
    from graft.settings import load

    with failures(as_json=as_json):
        settings = load()
        entry(settings, name)
        told = _described(settings, name)
    if as_json:
        print_json(told)
        return
    lineage = {f"lineage: {key}": _plain(value) for key, value in told.pop("lineage").items()}
    told["size_bytes"] = size_text(told["size_bytes"]) if told.get("size_bytes") else ""
    told["licence"] = told.pop("license")  # the spelling of tables; JSON has the contract's
    rows = [[key.replace("_", " "), value] for key, value in (told | lineage).items() if value not in ("", None)]
    print_table([], rows)


@models.command("add")
def models_add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What requests and jobs will call it.")],
    source: Annotated[str, typer.Argument(metavar="FOLDER|hub:ORG/NAME", help="A folder in safetensors, or the hub.")],
    license: Annotated[str, typer.Option("--license", help="SPDX id of the weights' licence.")] = "",
    revision: Annotated[str, typer.Option("--revision", help="Branch, tag or commit on the hub.")] = "",
    as_json: Json = False,
) -> None:
    """Add a base model to this home's catalogue. A running stack notices by itself."""
    from graft.domain.errors import InvalidArgument
    from graft.registry import catalog
    from graft.registry.facts import read_facts
    from graft.registry.sources import cache_folder
    from graft.settings import load

    with failures(as_json=as_json):
        settings = load()
        catalog.check_free(settings, name)  # before gigabytes are hashed
        content: dict[str, Any] = {"license": license} if license else {}
        if source.startswith("hub:"):
            content |= {"hub": source.removeprefix("hub:")} | ({"revision": revision} if revision else {})
            then = f" Run `graft models pull {name}` to download it."
        else:
            if revision:
                raise InvalidArgument("--revision is for the hub; a folder has none.", reason="REVISION_NOT_ON_HUB")
            folder = Path(source).expanduser().absolute()
            if not folder.is_dir():
                raise InvalidArgument(_no_folder(name, source, folder), reason="BASE_MODEL_FOLDER_MISSING")
            read_facts(name, folder, cache_folder(settings))  # refused now, not by a job
            content["folder"] = str(folder)
            then = ""
        catalog.put(settings, name, content)
        told = _described(settings, name)
    if as_json:
        print_json(told)
    else:
        print(f"{name} is in {catalog.own_file(settings)}.{then}")


@models.command("pull")
def models_pull(name: Name, as_json: Json = False) -> None:
    """Download a base model from the hub, which no other command asks. Goes on where it was cut off."""
    from graft.registry.catalog import entry
    from graft.registry.sources import pull
    from graft.settings import load

    with failures(as_json=as_json), cleaned_up():
        settings = load()
        pull(settings, entry(settings, name), show_progress=sys.stderr.isatty() and not as_json)
        told = _described(settings, name)
    if as_json:
        print_json(told)
    else:
        print(
            f"{name} is ready: {told['parameter_count'] / 1e6:.0f}M parameters, {size_text(told['size_bytes'])}, "
            f"in {told['folder']}."
        )


@models.command("derive")
def models_derive(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The base model to cut.")],
    layers: Annotated[int, typer.Option("--layers", help="Layers to keep.")],
    name: Annotated[str, typer.Option("--name", help="What the new base model is called.")],
    data: Annotated[
        Path | None, typer.Option("--data", help="Text to heal on: .txt, or .jsonl rows with `text`.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=0, help="Most tokens; 0: what the time allows.")] = 0,
    max_minutes: Annotated[float, typer.Option("--max-minutes", min=0.05, help="Longest healing.")] = 10.0,
    choose: Annotated[Choice, typer.Option("--choose", help="How the layers to keep are chosen.")] = Choice.ANGLE,
    as_json: JsonLines = False,
) -> None:
    """Make a smaller base model: cut layers out, then heal what is left by training on raw text.

    Runs here, without a stack. Without --data it learns from documentation that every Python carries.
    """
    from graft.registry.derive import Request, derive
    from graft.settings import load

    request = Request(base, name, layers, data, tokens, max_minutes, choose.value)
    with failures(as_json=as_json), cleaned_up():
        settings = load()
        if as_json:
            lineage = derive(settings, request, lambda report: print_json(report, line=True))
            print_json({"kind": "entered", "model": _described(settings, name)}, line=True)
            return
        with Deriving(console) as shown:
            lineage = derive(settings, request, shown.report)
        told = _described(settings, name)
    before, cut, after = lineage["perplexity"].values()
    print(
        f"{name} is in the catalogue: {told['parameter_count'] / 1e6:.0f}M parameters, layers "
        f"{_plain(lineage['layers_kept'])} of {base}. Held-out perplexity {before:.4g} before the cut, {cut:.4g} after "
        f"it, {after:.4g} after healing with {lineage['tokens_healed']:,} tokens."
    )


def _no_folder(name: str, source: str, folder: Path) -> str:
    """What is told of a source that is no folder; most often it was meant for the hub."""
    repository = re.sub(r"^https?://(www\.)?(huggingface\.co|hf\.co)/", "", source)
    on_hub = re.fullmatch(r"([\w.-]+/[\w.-]+)(/tree/([\w.-]+))?/?", repository)
    if on_hub is None:
        return f"{folder} is no folder. Give a folder in safetensors, or hub:ORG/NAME."
    revision = f" --revision {on_hub[3]}" if on_hub[3] else ""
    place = folder if repository == source else source
    return f"{place} is no folder. If it is on the hub: `graft models add {name} hub:{on_hub[1]}{revision}`."


def _list_local(*, as_json: bool) -> None:
    from graft.registry.catalog import entries
    from graft.settings import load

    settings = load()
    told = [_described(settings, name) for name in entries(settings)]
    if as_json:
        print_json(told)
        return
    rows = [
        [
            one["name"],
            one["state"],
            f"{one['parameter_count'] / 1e6:.0f}M" if "parameter_count" in one else "",
            size_text(one["size_bytes"]) if "size_bytes" in one else "",
            f"{one['context_tokens']} tokens" if "context_tokens" in one else "",
            one["license"],
            one["source"],
        ]
        for one in told
    ]
    print_table(["MODEL", "STATE", "PARAMETERS", "SIZE", "CONTEXT", "LICENCE", "SOURCE"], rows)
    for one in told:
        if "error" in one:
            print(one["error"], file=sys.stderr)


def _described(settings: "Settings", name: str) -> dict[str, Any]:
    """An entry of the local catalogue: what it says, and what is known of its folder if that is there."""
    from graft.domain.errors import GraftError
    from graft.registry.base_models import known_license
    from graft.registry.catalog import Hub, entry
    from graft.registry.facts import read_facts, read_lineage
    from graft.registry.sources import cache_folder, ready_folder, source_text, unmade

    one = entry(settings, name)
    told: dict[str, Any] = {"name": name, "state": "ready", "license": one.license, "source": source_text(one)}
    try:
        folder = ready_folder(settings, one)
        if folder is None:
            if not isinstance(one.source, Hub):
                unmade(one)
            state = "not pulled" if isinstance(one.source, Hub) else "to be converted"
            return told | {"state": state, "lineage": {}}
        facts = read_facts(name, folder, cache_folder(settings))
        lineage, license = read_lineage(folder), known_license(one, folder)
    except GraftError as error:
        return told | {"state": "unusable", "error": error.message, "lineage": {}}
    return told | {
        "license": license,
        "parameter_count": facts.parameter_count,
        "size_bytes": facts.size_bytes,
        "context_tokens": min(facts.context_tokens, settings.serving.context_tokens),
        "layers": facts.layers,
        "digest": facts.digest,
        "folder": str(folder),
        "lineage": lineage,
    }


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(each)}" for key, each in value.items())
    if isinstance(value, list):
        return " ".join(map(_plain, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
