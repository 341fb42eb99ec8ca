"""`/v1/deployments`: base models that are served beside the first."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from graft.api.v1 import base_model_service_pb2
from graft.domain.deployments import Deployment
from graft.gateway import convert
from graft.gateway.http.messages import parsed, told
from graft.gateway.http.requests import core_of, json_object, listing, page, project_of


async def create_deployment(request: Request) -> Response:
    """Takes `model` and `deployment_id` of `graft.api.v1.DeployModelRequest`. Asking again returns what there is."""
    core, project = core_of(request), project_of(request)
    asked = parsed(await json_object(request), base_model_service_pb2.DeployModelRequest(), "deployment", ("parent",))
    return JSONResponse(_json(await core.deployments.deploy(project, asked.model, asked.deployment_id)))


async def list_deployments(request: Request) -> Response:
    """By id."""
    deployments, project = core_of(request).deployments, project_of(request)
    found, has_more = await page(
        request,
        lambda size, token: deployments.page(project, size, token),
        lambda after: deployments.get(project, after),
    )
    return JSONResponse(listing([_json(one) for one in found], has_more))


async def retrieve_deployment(request: Request) -> Response:
    """One deployment."""
    return JSONResponse(_json(await core_of(request).deployments.get(project_of(request), _id(request))))


async def delete_deployment(request: Request) -> Response:
    """Asks for its end; it is listed as stopping until its engine has ended."""
    return JSONResponse(_json(await core_of(request).deployments.undeploy(project_of(request), _id(request))))


def _id(request: Request) -> str:
    return str(request.path_params["deployment_id"])


def _json(found: Deployment) -> dict[str, Any]:
    return told("deployment", found.base_model, convert.deployment(found))
