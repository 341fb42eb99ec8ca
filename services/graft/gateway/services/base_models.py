"""BaseModelService over the core."""

from typing import Any

from graft.api.v1 import base_model_pb2, base_model_service_pb2, base_model_service_pb2_grpc
from graft.gateway import convert
from graft.gateway.checks import check_page_size
from graft.gateway.core import Core
from graft.gateway.services.names import cursor, parent_project, split


class BaseModelService(base_model_service_pb2_grpc.BaseModelServiceServicer):
    """The catalogue of base models."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def GetBaseModel(
        self, request: base_model_service_pb2.GetBaseModelRequest, _context: Any
    ) -> base_model_pb2.BaseModel:
        """One base model."""
        project, base = split(request.name, "baseModels")
        return convert.base_model(project, await self._core.get_base_model(base))

    async def ListBaseModels(
        self, request: base_model_service_pb2.ListBaseModelsRequest, _context: Any
    ) -> base_model_service_pb2.ListBaseModelsResponse:
        """A page, by id. The catalogue is a short list in a file, so that a position serves as page token."""
        project = parent_project(request.parent)
        start, size = cursor(request.page_token), check_page_size(request.page_size)
        models = await self._core.list_base_models()
        return base_model_service_pb2.ListBaseModelsResponse(
            base_models=[convert.base_model(project, one) for one in models[start : start + size]],
            next_page_token=str(start + size) if start + size < len(models) else "",
        )
