"""The tasks that Graft brings, told alike by gRPC, HTTP and both clients."""

import asyncio
from pathlib import Path

import pytest

from graft.api.v1.task_service_pb2 import GetTaskRequest, ListTasksRequest
from graft.api.v1.task_service_pb2_grpc import TaskServiceStub
from graft.client import AsyncGraft, Connection, Graft
from graft.data.tasks.catalog import builtin, names
from graft.data.tasks.definition import load
from graft.domain.errors import InvalidArgument, NotFound
from graft.gateway.convert_tasks import task
from tests.support.gateways import gateway, refused

PARENT = "projects/default"


async def test_a_task_tells_its_fields_template_labels_metrics_and_decoding(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        told = await TaskServiceStub(it.channel).GetTask(GetTaskRequest(name=f"{PARENT}/tasks/sentiment"))
        found = builtin("sentiment")
        assert (told.name, told.task, told.version) == (f"{PARENT}/tasks/sentiment", "sentiment", 1)
        assert [(one.name, one.description, one.optional) for one in told.fields] == [
            ("review", "The text to judge.", False)
        ]
        assert (told.completion.field, told.user) == ("sentiment", found.user)
        assert (list(told.labels), told.labels_from_data) == (["positive", "negative"], False)
        assert list(told.metrics) == ["accuracy", "macro_f1"]
        assert (told.decoding.max_tokens, told.decoding.temperature, told.decoding.choose_label) == (8, 0.0, True)
        assert (told.digest, load(told.definition)) == (found.digest, found)


async def test_tasks_are_listed_by_name_a_page_at_a_time(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        stub = TaskServiceStub(it.channel)
        seen, token = [], ""
        while True:
            page = await stub.ListTasks(ListTasksRequest(parent=PARENT, page_size=3, page_token=token))
            assert len(page.tasks) <= 3
            seen += page.tasks
            token = page.next_page_token
            if not token:
                break
        assert seen == [task("default", builtin(name)) for name in names()]
        error = await refused(stub.ListTasks(ListTasksRequest(parent=PARENT, page_token="x")))
        assert (type(error), error.reason) == (InvalidArgument, "INVALID_PAGE_TOKEN")


async def test_an_unknown_task_is_not_found_and_the_ones_that_exist_are_named(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        stub = TaskServiceStub(it.channel)
        error = await refused(stub.GetTask(GetTaskRequest(name=f"{PARENT}/tasks/sentment")))
        assert isinstance(error, NotFound)
        assert "did you mean 'sentiment'" in error.message
        error = await refused(stub.GetTask(GetTaskRequest(name="sentiment")))
        assert isinstance(error, InvalidArgument)


async def test_both_clients_list_and_get_tasks(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        connection = Connection(address=it.address)

        def blocking() -> None:
            with Graft(connection) as client:
                assert [one.task for one in client.tasks()] == list(names())
                assert client.task("custom").fields[1].optional
                with pytest.raises(NotFound):
                    client.task("none")

        await asyncio.to_thread(blocking)
        async with AsyncGraft(connection) as client:
            assert [one.task for one in await client.tasks()] == list(names())
            assert (await client.task(f"{PARENT}/tasks/chat")).conversations
