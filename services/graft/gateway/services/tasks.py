"""TaskService over the core."""

from typing import Any

from graft.api.v1 import task_pb2, task_service_pb2, task_service_pb2_grpc
from graft.gateway import convert_tasks as convert
from graft.gateway.checks import check_page_size
from graft.gateway.core import Core
from graft.gateway.services.names import cursor, parent_project, split


class TaskService(task_service_pb2_grpc.TaskServiceServicer):
    """The tasks that Graft brings."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def GetTask(self, request: task_service_pb2.GetTaskRequest, _context: Any) -> task_pb2.Task:
        """One task."""
        project, name = split(request.name, "tasks")
        return convert.task(project, self._core.get_task(name))

    async def ListTasks(
        self, request: task_service_pb2.ListTasksRequest, _context: Any
    ) -> task_service_pb2.ListTasksResponse:
        """A page, by name. They are a short list of files, so that a position serves as page token."""
        project = parent_project(request.parent)
        start, size = cursor(request.page_token), check_page_size(request.page_size)
        tasks = self._core.list_tasks()
        return task_service_pb2.ListTasksResponse(
            tasks=[convert.task(project, one) for one in tasks[start : start + size]],
            next_page_token=str(start + size) if start + size < len(tasks) else "",
        )
