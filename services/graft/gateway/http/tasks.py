"""`/v1/tasks`: the tasks that Graft brings. Tasks of one's own are given with each job, and kept with what it makes."""

from dataclasses import asdict

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from graft.data.tasks.definition import TaskDefinition
from graft.gateway.http.requests import core_of, listing, project_of


async def list_tasks(request: Request) -> Response:
    """By name; all of them, since they are few."""
    project_of(request)
    return JSONResponse(listing([_json(one) for one in core_of(request).list_tasks()], has_more=False))


async def retrieve_task(request: Request) -> Response:
    """One task."""
    project_of(request)
    return JSONResponse(_json(core_of(request).get_task(str(request.path_params["task"]))))


def _json(found: TaskDefinition) -> dict[str, object]:
    """Its parts, and `definition`: the whole as YAML, which a job's `task_definition` takes."""
    return {
        "id": found.name,
        "object": "task",
        **asdict(found),
        "digest": found.digest,
        "definition": found.to_text(),
    }
