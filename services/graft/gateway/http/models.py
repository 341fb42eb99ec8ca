"""`/v1/models`: base models, and of each adapter its champion and its newest version."""

from datetime import datetime

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from graft.domain.names import CHAMPION, parse_model
from graft.domain.resources import Adapter
from graft.gateway.http.requests import core_of, listing, project_of

_NO_AGE = 0
"""`created` of a base model, whose age the catalogue does not know; OpenAI's type demands a number."""


async def list_models(request: Request) -> Response:
    """Every name that can be asked for. Not paged, as OpenAI's is not."""
    core, project = core_of(request), project_of(request)
    data = [_model(base.id) for base in await core.list_base_models(project)]
    token = ""
    while True:
        page = await core.list_adapters(project, page_token=token)
        for adapter in page.items:
            data += _of_adapter(adapter)
        token = page.next_page_token
        if not token:
            return JSONResponse(listing(data, has_more=False))


async def retrieve_model(request: Request) -> Response:
    """One base model, adapter, version or alias. Raises NotFound naming what exists."""
    core, project = core_of(request), project_of(request)
    name = parse_model(request.path_params["model"])
    if name.adapter is None:
        return JSONResponse(_model((await core.get_base_model(project, name.base)).id))
    selector = str(name.version) if name.version is not None else str(name.alias)
    version = await core.get_version(project, name.base, name.adapter, selector)
    return JSONResponse(_model(request.path_params["model"], project, version.create_time))


def _of_adapter(adapter: Adapter) -> list[dict[str, object]]:
    line = f"{adapter.base_model}:{adapter.adapter}"
    newest = f"{line}@{adapter.newest_version}"
    names = [line, newest] if CHAMPION in adapter.aliases else [newest]
    return [_model(name, adapter.project, adapter.create_time) for name in names]


def _model(name: str, owner: str = "graft", created: datetime | None = None) -> dict[str, object]:
    return {
        "id": name,
        "object": "model",
        "created": int(created.timestamp()) if created else _NO_AGE,
        "owned_by": owner,
    }
