"""`/v1/files`: data sets as OpenAI's files. The only purpose is `fine-tune`."""

import re
from contextlib import AsyncExitStack

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from graft.domain.resources import DatasetFormat
from graft.gateway.checks import CONTROL, MAX_NAME_CHARACTERS
from graft.gateway.http import convert
from graft.gateway.http.multipart import Field, FileStart, pieces
from graft.gateway.http.requests import (
    core_of,
    idempotency_key,
    invalid,
    limit_of,
    listing,
    page_after,
    project_of,
    query_of,
)
from graft.gateway.uploads import Upload

MAX_LIMIT = 10_000
"""OpenAI's highest and default `limit` of files; one answer holds at most 1000 and says that there are more."""


async def create_file(request: Request) -> Response:
    """Streams the file to disk while validating it. Fields may come before or after it."""
    core, project = core_of(request), project_of(request)
    upload: Upload | None = None
    purpose = ""
    format: DatasetFormat | None = None
    async with AsyncExitStack() as stack:
        async for piece in pieces(request):
            if isinstance(piece, FileStart):
                if piece.name != "file" or upload is not None:
                    raise invalid(piece.name, "exactly one file is taken, in a part named 'file'")
                begun = core.begin_upload(project, _display_name(piece.filename), idempotency_key(request), format)
                upload = await stack.enter_async_context(begun)
            elif isinstance(piece, Field):
                if piece.name == "format":
                    format = _check_format(piece.value)
                elif piece.name == "purpose":
                    purpose = _check_purpose(piece.value)
                else:
                    raise invalid(piece.name, "is not supported; files are kept until they are deleted")
            elif upload is not None:
                await upload.write(piece.data)
        if upload is None:
            raise invalid("file", "is required, as a part with a filename")
        if not purpose:
            raise invalid("purpose", f"is required; use {convert.PURPOSE!r}")
        if format is not None:
            upload.declare(format)
        dataset = await upload.finish()
    return JSONResponse(convert.file(dataset))


def _check_format(value: str) -> DatasetFormat:
    """Graft's own field: how rows are to be read that may be read in several ways."""
    try:
        return DatasetFormat(value)
    except ValueError:
        raise invalid("format", f"{value!r} is not known; use one of {', '.join(DatasetFormat)}") from None


def _check_purpose(purpose: str) -> str:
    if purpose != convert.PURPOSE:
        raise invalid("purpose", f"{purpose!r} is not supported; use {convert.PURPOSE!r}")
    return purpose


def _display_name(filename: str) -> str:
    """The last part of a path, without control characters."""
    name = CONTROL.sub("", re.split(r"[/\\]", filename)[-1])
    return name[-MAX_NAME_CHARACTERS:] or "data.jsonl"


async def list_files(request: Request) -> Response:
    """Newest first."""
    core, project = core_of(request), project_of(request)
    query = query_of(request, "after", "limit", "order", "purpose")
    if query.get("order", "desc") != "desc":
        raise invalid("order", "only 'desc', newest first, is supported")
    limit = limit_of(query, MAX_LIMIT, MAX_LIMIT)
    if query.get("purpose", convert.PURPOSE) != convert.PURPOSE:
        return JSONResponse(listing([], has_more=False))
    found, has_more = await page_after(
        core,
        lambda size, token: core.list_datasets(project, size, token),
        query.get("after"),
        limit,
        lambda after: core.get_dataset(project, after),
    )
    return JSONResponse(listing([convert.file(one) for one in found], has_more))


async def retrieve_file(request: Request) -> Response:
    """One file's description."""
    dataset = await core_of(request).get_dataset(project_of(request), request.path_params["file_id"])
    return JSONResponse(convert.file(dataset))


async def file_content(request: Request) -> Response:
    """The file as it was uploaded."""
    core, project, file_id = core_of(request), project_of(request), request.path_params["file_id"]
    dataset = await core.get_dataset(project, file_id)
    path = await core.dataset_path(project, file_id)
    return FileResponse(path, media_type="application/octet-stream", filename=dataset.display_name)


async def delete_file(request: Request) -> Response:
    """Row and file."""
    deleted = await core_of(request).delete_dataset(project_of(request), request.path_params["file_id"])
    return JSONResponse({"id": deleted.id, "object": "file", "deleted": True})
