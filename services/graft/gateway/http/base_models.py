"""`/v1/base_models`: the catalogue, of whose models `/v1/models` tells the names alone."""

from collections.abc import Collection
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from graft.domain.resources import BaseModel
from graft.gateway import convert
from graft.gateway.http.messages import told
from graft.gateway.http.requests import core_of, invalid, limit_of, listing, project_of, query_of


async def list_base_models(request: Request) -> Response:
    """By id."""
    core, project = core_of(request), project_of(request)

    query = query_of(request, "after", "limit")
    after, limit = query.get("after"), limit_of(query, 20, 100)
    every = await core.list_base_models(project)  # a short list
    ids = [one.id for one in every]
    if after is not None and after not in ids:
        raise invalid("after", f"{after!r} is not in this list")
    start = 0 if after is None else ids.index(after) + 1
    served = await core.deployments.served()
    found = [_json(project, one, served) for one in every[start : start + limit]]
    return JSONResponse(listing(found, has_more=start + limit < len(every)))


async def retrieve_base_model(request: Request) -> Response:
    """One base model."""
    core, project = core_of(request), project_of(request)
    found = await core.get_base_model(project, str(request.path_params["base_model"]))
    return JSONResponse(_json(project, found, await core.deployments.served()))


def _json(project: str, found: BaseModel, served: Collection[str]) -> dict[str, Any]:
    return told("base_model", found.id, convert.base_model(project, found, served))
