"""`/v1/fine_tuning/jobs`: create, list, retrieve, cancel, events and checkpoints. Lists are newest first."""

import re

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from graft.domain.errors import GraftError
from graft.gateway.http import convert
from graft.gateway.http.job_spec import in_openai_names, job_spec
from graft.gateway.http.requests import (
    core_of,
    idempotency_key,
    invalid,
    json_object,
    limit_of,
    listing,
    page_after,
    project_of,
    query_of,
)

DEFAULT_LIMIT = 20
DEFAULT_CHECKPOINTS = 10
"""OpenAI's defaults."""
MAX_LIMIT = 1000


async def create_job(request: Request) -> Response:
    """Checks and stores a job; the orchestrator takes it from there."""
    core, project = core_of(request), project_of(request)
    body = await json_object(request)
    spec = job_spec(body)
    try:
        job = await core.create_job(project, spec, idempotency_key(request))
    except GraftError as error:
        raise in_openai_names(error, body) from error
    return JSONResponse(convert.job(job))


async def list_jobs(request: Request) -> Response:
    """A page of jobs."""
    core, project = core_of(request), project_of(request)
    query = query_of(request, "after", "limit")
    limit = limit_of(query, DEFAULT_LIMIT, MAX_LIMIT)
    found, has_more = await page_after(
        core,
        lambda size, token: core.list_jobs(project, size, token),
        query.get("after"),
        limit,
        lambda after: core.get_job(project, after),
    )
    return JSONResponse(listing([convert.job(one) for one in found], has_more))


async def retrieve_job(request: Request) -> Response:
    """One job."""
    return JSONResponse(convert.job(await core_of(request).get_job(project_of(request), request.path_params["job_id"])))


async def cancel_job(request: Request) -> Response:
    """Writes the wish; the status follows when the orchestrator has acted."""
    job = await core_of(request).cancel_job(project_of(request), request.path_params["job_id"])
    return JSONResponse(convert.job(job))


async def list_events(request: Request) -> Response:
    """A page of events; `after` leads to older ones."""
    core, project, job_id = core_of(request), project_of(request), request.path_params["job_id"]
    query = query_of(request, "after", "limit")
    limit = limit_of(query, DEFAULT_LIMIT, MAX_LIMIT)
    last = await core.last_sequence(project, job_id)
    after = query.get("after")
    before = _sequence(job_id, after, last) if after else last + 1
    # Sequences count from 1 without gaps, so that the page's place is known.
    start = max(0, before - 1 - limit)
    events = await core.list_events(project, job_id, start, limit)
    older = [convert.event(job_id, one) for one in reversed(events) if one.sequence < before]
    return JSONResponse(listing(older, has_more=start > 0))


def _sequence(job_id: str, after: str, last: int) -> int:
    found = re.fullmatch(r"ftevent-(.+)-([1-9][0-9]{0,17})", after)
    if found is None or found[1] != job_id or int(found[2]) > last:
        raise invalid("after", f"{after!r} is not the id of one of this job's events")
    return int(found[2])


async def list_checkpoints(request: Request) -> Response:
    """A page of checkpoints; `after` leads to older ones."""
    core, project, job_id = core_of(request), project_of(request), request.path_params["job_id"]
    query = query_of(request, "after", "limit")
    limit = limit_of(query, DEFAULT_CHECKPOINTS, MAX_LIMIT)
    found = (await core.list_checkpoints(project, job_id))[::-1]
    start = 0
    if "after" in query:
        ids = [convert.checkpoint_id(job_id, one) for one in found]
        if query["after"] not in ids:
            raise invalid("after", f"{query['after']!r} is not the id of one of this job's checkpoints")
        start = ids.index(query["after"]) + 1
    page = [convert.checkpoint(job_id, one) for one in found[start : start + limit]]
    return JSONResponse(listing(page, has_more=start + limit < len(found)))
