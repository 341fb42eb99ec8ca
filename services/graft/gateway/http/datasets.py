"""`/v1/files/{file}/validate`: what a check of a data set finds. Graft's own, since OpenAI has no such object."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from graft.api.v1 import dataset_service_pb2
from graft.gateway import convert_checks
from graft.gateway.http.messages import parsed, told
from graft.gateway.http.requests import core_of, json_object, project_of


async def validate_file(request: Request) -> Response:
    """Takes the fields of `graft.api.v1.ValidateDatasetRequest` but `name`; waits for the report."""
    core, project, file_id = core_of(request), project_of(request), str(request.path_params["file_id"])
    asked = parsed(await json_object(request), dataset_service_pb2.ValidateDatasetRequest(), "check", ("name",))
    spec = convert_checks.check_spec(project, file_id, asked, core.settings.serving.base_model)
    report = await core.validate_dataset(project, spec)
    return JSONResponse(told("dataset_report", file_id, convert_checks.dataset_report(report)))
