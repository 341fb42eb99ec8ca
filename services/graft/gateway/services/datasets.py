"""DatasetService over the core."""

from collections.abc import AsyncIterator
from typing import Any

from google.protobuf import empty_pb2

from graft.api.v1 import dataset_pb2, dataset_report_pb2, dataset_service_pb2, dataset_service_pb2_grpc
from graft.domain.errors import FieldViolation, InvalidArgument
from graft.gateway import convert, convert_checks
from graft.gateway.core import Core
from graft.gateway.services.names import parent_project, split


class DatasetService(dataset_service_pb2_grpc.DatasetServiceServicer):
    """Uploads and keeps data sets."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def UploadDataset(
        self, requests: AsyncIterator[dataset_service_pb2.UploadDatasetRequest], _context: Any
    ) -> dataset_pb2.Dataset:
        """One header, then chunks. Refuses by limit while it reads, before anything is stored."""
        first = await anext(aiter(requests), None)
        if first is None or first.WhichOneof("part") != "header":
            raise _misplaced("header", "the first message of an upload must be its header")
        header = first.header
        project = parent_project(header.parent, "header.parent")
        declared = convert.declared_format(header.format)
        async with self._core.begin_upload(project, header.display_name, header.request_id, declared) as upload:
            async for request in requests:
                if request.WhichOneof("part") != "chunk":
                    raise _misplaced("chunk", "every message after the header must be a chunk")
                await upload.write(request.chunk)
            return convert.dataset(await upload.finish())

    async def GetDataset(self, request: dataset_service_pb2.GetDatasetRequest, _context: Any) -> dataset_pb2.Dataset:
        """One data set."""
        project, dataset_id = split(request.name, "datasets")
        return convert.dataset(await self._core.get_dataset(project, dataset_id))

    async def ListDatasets(
        self, request: dataset_service_pb2.ListDatasetsRequest, _context: Any
    ) -> dataset_service_pb2.ListDatasetsResponse:
        """A page, newest first."""
        project = parent_project(request.parent)
        page = await self._core.list_datasets(project, request.page_size, request.page_token)
        return dataset_service_pb2.ListDatasetsResponse(
            datasets=[convert.dataset(one) for one in page.items], next_page_token=page.next_page_token
        )

    async def DeleteDataset(self, request: dataset_service_pb2.DeleteDatasetRequest, _context: Any) -> empty_pb2.Empty:
        """Row and file."""
        project, dataset_id = split(request.name, "datasets")
        await self._core.delete_dataset(project, dataset_id)
        return empty_pb2.Empty()

    async def ValidateDataset(
        self, request: dataset_service_pb2.ValidateDatasetRequest, _context: Any
    ) -> dataset_report_pb2.DatasetReport:
        """Waits for the orchestrator's report."""
        project, dataset_id = split(request.name, "datasets")
        served_base = self._core.settings.serving.base_model
        asked = convert_checks.check_spec(project, dataset_id, request, served_base)
        return convert_checks.dataset_report(await self._core.validate_dataset(project, asked))


def _misplaced(field: str, description: str) -> InvalidArgument:
    return InvalidArgument(
        f"{field}: {description}", reason="BAD_UPLOAD", violations=(FieldViolation(field, description),)
    )
