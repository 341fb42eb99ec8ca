"""FineTuningService over the core."""

from collections.abc import AsyncIterator
from typing import Any

from graft.api.v1 import fine_tuning_job_pb2, fine_tuning_service_pb2, fine_tuning_service_pb2_grpc
from graft.gateway import convert_jobs as convert
from graft.gateway.checks import check_page_size
from graft.gateway.core import Core
from graft.gateway.services.names import cursor, parent_project, split
from graft.gateway.services.pages import fitting


class FineTuningService(fine_tuning_service_pb2_grpc.FineTuningServiceServicer):
    """Creates and follows fine-tuning jobs."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def CreateFineTuningJob(
        self, request: fine_tuning_service_pb2.CreateFineTuningJobRequest, _context: Any
    ) -> fine_tuning_job_pb2.FineTuningJob:
        """Checks and stores; the orchestrator takes it from there."""
        project = parent_project(request.parent)
        spec = convert.job_spec(project, request.fine_tuning_job)
        return convert.job(await self._core.create_job(project, spec, request.request_id))

    async def GetFineTuningJob(
        self, request: fine_tuning_service_pb2.GetFineTuningJobRequest, _context: Any
    ) -> fine_tuning_job_pb2.FineTuningJob:
        """One job."""
        project, job_id = split(request.name, "fineTuningJobs")
        return convert.job(await self._core.get_job(project, job_id))

    async def ListFineTuningJobs(
        self, request: fine_tuning_service_pb2.ListFineTuningJobsRequest, _context: Any
    ) -> fine_tuning_service_pb2.ListFineTuningJobsResponse:
        """A page, newest first."""
        project = parent_project(request.parent)
        return await fitting(
            self._core,
            request.page_size,
            lambda size: self._core.list_jobs(project, size, request.page_token),
            lambda page: fine_tuning_service_pb2.ListFineTuningJobsResponse(
                fine_tuning_jobs=[convert.job(one) for one in page.items], next_page_token=page.next_page_token
            ),
        )

    async def CancelFineTuningJob(
        self, request: fine_tuning_service_pb2.CancelFineTuningJobRequest, _context: Any
    ) -> fine_tuning_job_pb2.FineTuningJob:
        """Writes the wish; the state follows when the orchestrator has acted."""
        project, job_id = split(request.name, "fineTuningJobs")
        return convert.job(await self._core.cancel_job(project, job_id))

    async def WatchFineTuningJob(
        self, request: fine_tuning_service_pb2.WatchFineTuningJobRequest, _context: Any
    ) -> AsyncIterator[fine_tuning_service_pb2.WatchFineTuningJobResponse]:
        """Events from the cursor on, until the job ends."""
        project, job_id = split(request.name, "fineTuningJobs")
        async for event, job in self._core.watch_job(project, job_id, request.after_sequence):
            yield fine_tuning_service_pb2.WatchFineTuningJobResponse(
                event=convert.event(event), fine_tuning_job=convert.job(job)
            )

    async def ListFineTuningJobEvents(
        self, request: fine_tuning_service_pb2.ListFineTuningJobEventsRequest, _context: Any
    ) -> fine_tuning_service_pb2.ListFineTuningJobEventsResponse:
        """A page in order; its token is the last event's sequence."""
        project, job_id = split(request.parent, "fineTuningJobs", field="parent")
        after, size = cursor(request.page_token), check_page_size(request.page_size)
        events = await self._core.list_events(project, job_id, after, size)
        more = len(events) == size and await self._core.list_events(project, job_id, events[-1].sequence, 1)
        return fine_tuning_service_pb2.ListFineTuningJobEventsResponse(
            events=[convert.event(one) for one in events],
            next_page_token=str(events[-1].sequence) if more else "",
        )

    async def ListFineTuningJobCheckpoints(
        self, request: fine_tuning_service_pb2.ListFineTuningJobCheckpointsRequest, _context: Any
    ) -> fine_tuning_service_pb2.ListFineTuningJobCheckpointsResponse:
        """A page in order; its token is a position, which holds because checkpoints are only ever added."""
        project, job_id = split(request.parent, "fineTuningJobs", field="parent")
        start, size = cursor(request.page_token), check_page_size(request.page_size)
        found = await self._core.list_checkpoints(project, job_id)
        return fine_tuning_service_pb2.ListFineTuningJobCheckpointsResponse(
            checkpoints=[convert.checkpoint(one) for one in found[start : start + size]],
            next_page_token=str(start + size) if start + size < len(found) else "",
        )
