"""EvaluationService over the core."""

from typing import Any

from graft.api.v1 import evaluation_pb2, evaluation_service_pb2, evaluation_service_pb2_grpc
from graft.gateway import convert_evaluations as convert
from graft.gateway.core import Core
from graft.gateway.services.names import parent_project, split
from graft.gateway.services.pages import fitting


class EvaluationService(evaluation_service_pb2_grpc.EvaluationServiceServicer):
    """Creates, shows and cancels evaluations."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def CreateEvaluation(
        self, request: evaluation_service_pb2.CreateEvaluationRequest, _context: Any
    ) -> evaluation_pb2.Evaluation:
        """Checked, then queued."""
        project = parent_project(request.parent)
        spec = convert.evaluation_spec(project, request.evaluation)
        return convert.evaluation(await self._core.create_evaluation(project, spec, request.request_id))

    async def GetEvaluation(
        self, request: evaluation_service_pb2.GetEvaluationRequest, _context: Any
    ) -> evaluation_pb2.Evaluation:
        """One evaluation."""
        return convert.evaluation(await self._core.get_evaluation(*split(request.name, "evaluations")))

    async def ListEvaluations(
        self, request: evaluation_service_pb2.ListEvaluationsRequest, _context: Any
    ) -> evaluation_service_pb2.ListEvaluationsResponse:
        """A page, newest first."""
        project = parent_project(request.parent)
        return await fitting(
            self._core,
            request.page_size,
            lambda size: self._core.list_evaluations(project, size, request.page_token),
            lambda page: evaluation_service_pb2.ListEvaluationsResponse(
                evaluations=[convert.evaluation(one) for one in page.items], next_page_token=page.next_page_token
            ),
        )

    async def CancelEvaluation(
        self, request: evaluation_service_pb2.CancelEvaluationRequest, _context: Any
    ) -> evaluation_pb2.Evaluation:
        """Writes the wish."""
        return convert.evaluation(await self._core.cancel_evaluation(*split(request.name, "evaluations")))

    async def GetEvaluationReport(
        self, request: evaluation_service_pb2.GetEvaluationReportRequest, _context: Any
    ) -> evaluation_service_pb2.GetEvaluationReportResponse:
        """The page."""
        html = await self._core.evaluation_report(*split(request.name, "evaluations"))
        return evaluation_service_pb2.GetEvaluationReportResponse(html=html)
