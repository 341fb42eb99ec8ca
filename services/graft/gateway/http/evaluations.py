"""`/v1/evaluations`: Graft's own, since OpenAI has no such object. Bodies are the gRPC messages as JSON."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from graft.api.v1 import evaluation_pb2
from graft.domain.evaluations import Evaluation
from graft.gateway import convert_evaluations as convert
from graft.gateway.http.messages import parsed, told
from graft.gateway.http.requests import (
    core_of,
    idempotency_key,
    json_object,
    listing,
    page,
    project_of,
)


async def create_evaluation(request: Request) -> Response:
    """Takes the input fields of `graft.api.v1.Evaluation`; data sets may be bare ids."""
    core, project = core_of(request), project_of(request)
    asked = parsed(await json_object(request), evaluation_pb2.Evaluation(), "evaluation")
    spec = convert.evaluation_spec(project, asked)
    return JSONResponse(_json(await core.create_evaluation(project, spec, idempotency_key(request))))


async def list_evaluations(request: Request) -> Response:
    """Newest first."""
    core, project = core_of(request), project_of(request)
    found, has_more = await page(
        request,
        lambda size, token: core.list_evaluations(project, size, token),
        lambda after: core.get_evaluation(project, after),
    )
    return JSONResponse(listing([_json(one) for one in found], has_more))


async def retrieve_evaluation(request: Request) -> Response:
    """One evaluation."""
    return JSONResponse(_json(await core_of(request).get_evaluation(project_of(request), _id(request))))


async def cancel_evaluation(request: Request) -> Response:
    """Writes the wish."""
    return JSONResponse(_json(await core_of(request).cancel_evaluation(project_of(request), _id(request))))


async def evaluation_report(request: Request) -> Response:
    """The page, which its own policy keeps from loading anything."""
    html = await core_of(request).evaluation_report(project_of(request), _id(request))
    return Response(html, media_type="text/html")


def _id(request: Request) -> str:
    return str(request.path_params["evaluation_id"])


def _json(found: Evaluation) -> dict[str, Any]:
    return told("evaluation", found.id, convert.evaluation(found))
