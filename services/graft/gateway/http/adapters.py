"""`/v1/adapters`: adapters by `base:adapter`, their versions and aliases, and where they are loaded."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from graft.api.v1 import adapter_service_pb2
from graft.domain.names import parse_model
from graft.domain.resources import Adapter, AdapterVersion
from graft.gateway import convert
from graft.gateway.http.messages import parsed, told
from graft.gateway.http.requests import (
    core_of,
    invalid,
    json_object,
    limit_of,
    listing,
    page,
    page_after,
    project_of,
    query_of,
)
from graft.internal.v1 import engine_pb2


async def list_adapters(request: Request) -> Response:
    """Of `base_model`, or of all base models."""
    core, project = core_of(request), project_of(request)
    query = query_of(request, "after", "limit", "base_model")
    base = query.get("base_model")

    async def find(after: str) -> Adapter:
        line = _line_of(after)
        if base not in (None, line[0]):
            raise invalid("after", f"{after!r} is an adapter of another base model")
        return await core.get_adapter(project, *line)

    found, has_more = await page_after(
        core,
        lambda size, token: core.list_adapters(project, base, size, token),
        query.get("after"),
        limit_of(query, 20, 100),
        find,
    )
    return JSONResponse(listing([_json(one) for one in found], has_more))


async def retrieve_adapter(request: Request) -> Response:
    """One adapter."""
    return JSONResponse(_json(await core_of(request).get_adapter(project_of(request), *_line(request))))


async def list_versions(request: Request) -> Response:
    """Newest first."""
    core, project, line = core_of(request), project_of(request), _line(request)

    async def find(after: str) -> AdapterVersion:
        name = parse_model(after)
        if (name.base, name.adapter) != line or name.version is None:
            raise invalid("after", f"{after!r} is no version of this adapter")
        return await core.get_version(project, *line, str(name.version))

    found, has_more = await page(request, lambda size, token: core.list_versions(project, *line, size, token), find)
    aliases = (await core.get_adapter(project, *line)).aliases
    return JSONResponse(listing([_version_json(one, aliases) for one in found], has_more))


async def retrieve_version(request: Request) -> Response:
    """One version, by its number or an alias."""
    core, project, line = core_of(request), project_of(request), _line(request)
    found = await core.get_version(project, *line, _selector(request))
    return JSONResponse(_version_json(found, (await core.get_adapter(project, *line)).aliases))


async def set_alias(request: Request) -> Response:
    """Takes `version`, a number; waits until the registry has it."""
    core, project, alias = core_of(request), project_of(request), str(request.path_params["alias"])
    asked = parsed(await json_object(request), adapter_service_pb2.SetAdapterAliasRequest(), "alias", ("name", "alias"))
    return JSONResponse(_json(await core.set_alias(project, *_line(request), alias, asked.version)))


async def load_version(request: Request) -> Response:
    """Into the engine of every replica."""
    core, project = core_of(request), project_of(request)
    return _replicas(await core.load_version(project, *_line(request), _selector(request)))


async def unload_version(request: Request) -> Response:
    """Out of the engine of every replica."""
    core, project = core_of(request), project_of(request)
    return _replicas(await core.unload_version(project, *_line(request), _selector(request)))


async def residency(request: Request) -> Response:
    """What every replica holds, asked now."""
    return _replicas(await core_of(request).residency(project_of(request)))


def _line(request: Request) -> tuple[str, str]:
    """Base model and adapter of the path."""
    return _line_of(str(request.path_params["model"]))


def _line_of(text: str) -> tuple[str, str]:
    name = parse_model(text)
    if name.adapter is None or "@" in text:
        raise invalid("model", f"{text!r} is no adapter; write base:adapter, and its version behind /versions/")
    return name.base, name.adapter


def _selector(request: Request) -> str:
    return str(request.path_params["version"])


def _model(found: Adapter) -> str:
    return f"{found.base_model}:{found.adapter}"


def _json(found: Adapter) -> dict[str, Any]:
    return told("adapter", _model(found), convert.adapter(found))


def _version_json(found: AdapterVersion, aliases: dict[str, int]) -> dict[str, Any]:
    return told("adapter.version", found.model, convert.version(found, aliases))


def _replicas(found: list[engine_pb2.Replica]) -> Response:
    data = [told("replica", one.replica, one) for one in convert.replicas(found)]
    return JSONResponse(listing(data, has_more=False))
