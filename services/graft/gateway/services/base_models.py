"""BaseModelService over the core."""

from typing import Any

from graft.api.v1 import base_model_pb2, base_model_service_pb2, base_model_service_pb2_grpc, deployment_pb2
from graft.gateway import convert
from graft.gateway.checks import check_page_size
from graft.gateway.core import Core
from graft.gateway.services.names import cursor, parent_project, split


class BaseModelService(base_model_service_pb2_grpc.BaseModelServiceServicer):
    """The catalogue of base models, and which of them are served."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def GetBaseModel(
        self, request: base_model_service_pb2.GetBaseModelRequest, _context: Any
    ) -> base_model_pb2.BaseModel:
        """One base model."""
        project, base = split(request.name, "baseModels")
        return convert.base_model(
            project, await self._core.get_base_model(project, base), await self._core.deployments.served()
        )

    async def ListBaseModels(
        self, request: base_model_service_pb2.ListBaseModelsRequest, _context: Any
    ) -> base_model_service_pb2.ListBaseModelsResponse:
        """A page, by id. The catalogue is a short list in a file, so that a position serves as page token."""
        project = parent_project(request.parent)
        start, size = cursor(request.page_token), check_page_size(request.page_size)
        models = await self._core.list_base_models(project)
        served = await self._core.deployments.served()
        return base_model_service_pb2.ListBaseModelsResponse(
            base_models=[convert.base_model(project, one, served) for one in models[start : start + size]],
            next_page_token=str(start + size) if start + size < len(models) else "",
        )

    async def DeployModel(
        self, request: base_model_service_pb2.DeployModelRequest, _context: Any
    ) -> deployment_pb2.Deployment:
        """Writes the wish; the orchestrator carries it out."""
        project = parent_project(request.parent)
        return convert.deployment(await self._core.deployments.deploy(project, request.model, request.deployment_id))

    async def UndeployModel(
        self, request: base_model_service_pb2.UndeployModelRequest, _context: Any
    ) -> deployment_pb2.Deployment:
        """Writes the wish; the orchestrator carries it out."""
        return convert.deployment(await self._core.deployments.undeploy(*split(request.name, "deployments")))

    async def GetDeployment(
        self, request: base_model_service_pb2.GetDeploymentRequest, _context: Any
    ) -> deployment_pb2.Deployment:
        """One deployment."""
        return convert.deployment(await self._core.deployments.get(*split(request.name, "deployments")))

    async def ListDeployments(
        self, request: base_model_service_pb2.ListDeploymentsRequest, _context: Any
    ) -> base_model_service_pb2.ListDeploymentsResponse:
        """A page, by id."""
        project = parent_project(request.parent)
        page = await self._core.deployments.page(project, request.page_size, request.page_token)
        return base_model_service_pb2.ListDeploymentsResponse(
            deployments=[convert.deployment(one) for one in page.items], next_page_token=page.next_page_token
        )
