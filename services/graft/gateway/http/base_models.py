"""`/v1/base_models`: the catalogue, of whose models `/v1/models` tells the names alone."""

from collections.abc import Collection
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from graft.domain.resources import BaseModel
from graft.gateway import convert
from graft.gateway.http.messages import told
from graft.gateway.http.requests import core_of, listing, page, project_of
from graft.store.protocol import Page


async def list_base_models(request: Request) -> Response:
    """By id."""
    core, project = core_of(request), project_of(request)

    async def fetch(size: int, token: str) -> Page[BaseModel]:
        every, start = await core.list_base_models(project), int(token or 0)
        rest = start + size < len(every)
        return Page(every[start : start + size], str(start + size) if rest else "")

    found, has_more = await page(request, fetch, lambda one: one.id)
    served = await core.deployments.served()
    return JSONResponse(listing([_json(project, one, served) for one in found], has_more))


async def retrieve_base_model(request: Request) -> Response:
    """One base model."""
    core, project = core_of(request), project_of(request)
    found = await core.get_base_model(project, str(request.path_params["base_model"]))
    return JSONResponse(_json(project, found, await core.deployments.served()))


def _json(project: str, found: BaseModel, served: Collection[str]) -> dict[str, Any]:
    return told("base_model", found.id, convert.base_model(project, found, served))
