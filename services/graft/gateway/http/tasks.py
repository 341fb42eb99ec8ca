"""`/v1/tasks`: the tasks that Graft brings. Tasks of one's own are given with each job, and kept with what it makes."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from graft.data.tasks.definition import TaskDefinition
from graft.gateway import convert_tasks
from graft.gateway.http.messages import told
from graft.gateway.http.requests import core_of, listing, project_of


async def list_tasks(request: Request) -> Response:
    """By name; all of them, since they are few."""
    project = project_of(request)
    return JSONResponse(listing([_json(project, one) for one in core_of(request).list_tasks()], has_more=False))


async def retrieve_task(request: Request) -> Response:
    """One task."""
    project = project_of(request)
    return JSONResponse(_json(project, core_of(request).get_task(str(request.path_params["task"]))))


def _json(project: str, found: TaskDefinition) -> dict[str, Any]:
    return told("task", found.name, convert_tasks.task(project, found))
