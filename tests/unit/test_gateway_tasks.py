"""Named inputs and tasks of jobs through the public doors. The engine only tells what it was sent."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from graft.api.v1 import generation_pb2
from graft.api.v1.adapter_service_pb2 import GetAdapterVersionRequest
from graft.api.v1.adapter_service_pb2_grpc import AdapterServiceStub
from graft.api.v1.dataset_pb2 import DatasetFormat
from graft.api.v1.dataset_service_pb2 import UploadDatasetRequest
from graft.api.v1.dataset_service_pb2_grpc import DatasetServiceStub
from graft.api.v1.fine_tuning_job_pb2 import FineTuningJob, Grader, ReinforcementMethod
from graft.api.v1.fine_tuning_service_pb2 import CreateFineTuningJobRequest
from graft.api.v1.fine_tuning_service_pb2_grpc import FineTuningServiceStub
from graft.api.v1.generation_service_pb2 import GenerateRequest, StreamGenerateRequest
from graft.api.v1.generation_service_pb2_grpc import GenerationServiceStub
from graft.data.reading import read_rows
from graft.data.tasks import catalog
from graft.data.tasks.definition import load
from graft.domain.errors import FailedPrecondition, GraftError, InvalidArgument
from graft.internal.v1 import engine_pb2
from graft.store.protocol import Store
from tests.support.command import graft
from tests.support.gateways import BASE, Gateway, drained, gateway, refused, registry
from tests.support.http_gateways import http_gateway

REVIEWS = f"{BASE}:reviews"
ASKED = [{"role": "user", "content": "Is this review positive or negative?\n\nA joy."}]
RAW = """
name: raw
fields: {review: x}
completion: {field: verdict, template: " {{ verdict }}"}
labels: [yes, no]
prompt: "{{ review }}\\nGood?"
decoding: {max_tokens: 3, temperature: 0.5, stop: ["."], choices: labels}
"""


async def trained_with(store: Store, definition: str) -> None:
    """Makes the champion a version of that task."""
    known = registry()
    versions = tuple(replace(one, task_definition=definition if one.version == 3 else "") for one in known.versions)
    await store.replace_registry(replace(known, versions=versions))


def asking(model: str = REVIEWS, /, **inputs: str) -> GenerateRequest:
    return GenerateRequest(model=model, inputs=generation_pb2.TaskInputs(values=inputs))


async def test_named_inputs_become_the_trained_prompt_with_the_tasks_own_decoding(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        await trained_with(it.store, catalog.builtin("sentiment").to_text())
        stub = GenerationServiceStub(it.channel)
        answer = await stub.Generate(asking(review=" A joy. "))
        assert answer.model == f"{REVIEWS}@3"
        sent, body = it.engine.requests[0]
        assert sent.endpoint == engine_pb2.ENDPOINT_CHAT_COMPLETIONS
        assert body == {
            "model": REVIEWS,
            "messages": ASKED,
            "max_tokens": 8,
            "temperature": 0.0,
            "structured_outputs": {"choice": ["positive", "negative"]},
        }
        pieces = await drained(stub.StreamGenerate(StreamGenerateRequest(request=asking(review="A joy."))))
        assert pieces[-1].finish_reason == "stop"
        assert it.engine.requests[1][1]["messages"] == ASKED


async def test_a_request_goes_before_the_tasks_decoding(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        await trained_with(it.store, RAW)
        stub = GenerationServiceStub(it.channel)
        await stub.Generate(asking(review="Fine"))
        request = asking(review="Fine")
        request.sampling.CopyFrom(
            generation_pb2.SamplingParameters(max_tokens=9, temperature=0, stop=["!"], choices=["maybe", "no"])
        )
        await stub.Generate(request)
        (sent, own), (_, asked) = it.engine.requests
        assert sent.endpoint == engine_pb2.ENDPOINT_COMPLETIONS
        assert own == {
            "model": REVIEWS,
            "prompt": "Fine\nGood?",
            "max_tokens": 3,
            "temperature": 0.5,
            "stop": ["."],
            "structured_outputs": {"choice": [" yes", " no"]},
        }
        assert asked == {
            "model": REVIEWS,
            "prompt": "Fine\nGood?",
            "max_tokens": 9,
            "temperature": 0.0,
            "stop": ["!"],
            "structured_outputs": {"choice": ["maybe", "no"]},
        }


async def test_inputs_that_do_not_fit_are_refused_with_their_names_before_the_engine_is_asked(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        await trained_with(it.store, catalog.builtin("sentiment").to_text())
        stub = GenerationServiceStub(it.channel)
        for call in (
            stub.Generate(asking(text="A joy.")),
            drained(stub.StreamGenerate(StreamGenerateRequest(request=asking(text="A joy.")))),
        ):
            error = await refused(call)
            assert isinstance(error, InvalidArgument)
            assert error.reason == "INVALID_INPUTS"
            assert [one.field for one in error.violations] == ["inputs.text", "inputs.review"]
        for model in (f"{REVIEWS}@1", BASE):
            error = await refused(stub.Generate(asking(model, review="A joy.")))
            assert isinstance(error, InvalidArgument)
            assert error.reason == "NO_TASK"
        await trained_with(it.store, "name: from-the-future\nshape: round\n")
        error = await refused(stub.Generate(asking(review="A joy.")))
        assert isinstance(error, FailedPrecondition)
        assert error.reason == "TASK_NOT_READABLE"
        assert it.engine.requests == []


async def test_a_version_tells_its_task(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        await trained_with(it.store, RAW)
        stub = AdapterServiceStub(it.channel)
        name = f"projects/default/baseModels/{BASE}/adapters/reviews/versions"
        with_task = await stub.GetAdapterVersion(GetAdapterVersionRequest(name=f"{name}/3"))
        without = await stub.GetAdapterVersion(GetAdapterVersionRequest(name=f"{name}/1"))
        assert (with_task.task, with_task.task_definition) == ("raw", RAW)
        assert (without.task, without.task_definition) == ("", "")


async def test_the_openai_client_sends_inputs_in_its_extra_body(tmp_path: Path) -> None:
    async with http_gateway(tmp_path) as it:
        await trained_with(it.store, catalog.builtin("sentiment").to_text())
        extra: dict[str, Any] = {"inputs": {"review": "A joy."}}
        chat = it.client.chat.completions
        answer = await chat.create(model=REVIEWS, messages=[], extra_body=extra, max_completion_tokens=4)
        assert answer.model == f"{REVIEWS}@3"
        _, body = it.engine.requests[0]
        assert body == {
            "model": REVIEWS,
            "messages": ASKED,
            "max_completion_tokens": 4,
            "temperature": 0.0,
            "structured_outputs": {"choice": ["positive", "negative"]},
        }
        pieces = [piece async for piece in await chat.create(model=REVIEWS, messages=[], extra_body=extra, stream=True)]
        assert pieces[-1].choices[0].finish_reason == "stop"

        for told, wrong in (
            ("give one of them", {"messages": ASKED, "extra_body": extra}),
            ("not an object", {"messages": [], "extra_body": {"inputs": ["A joy."]}}),
            ("is not a text", {"messages": [], "extra_body": {"inputs": {"review": 7}}}),
        ):
            with pytest.raises(openai.BadRequestError, match=told):
                await chat.create(model=REVIEWS, **wrong)
        with pytest.raises(openai.BadRequestError, match="ask /v1/chat/completions"):
            await it.client.completions.create(model=REVIEWS, prompt="", extra_body=extra)
        await trained_with(it.store, RAW)
        answer = await it.client.completions.create(model=REVIEWS, prompt="", extra_body=extra)
        assert answer.choices[0].text == f"[{REVIEWS}@3] A joy.\nGood?"


async def test_the_command_sends_inputs(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        await trained_with(it.store, catalog.builtin("sentiment").to_text())
        ran = await graft("generate", REVIEWS, "--input", "review=-", stdin="A joy.", GRAFT_ADDRESS=it.address)
        assert ran.code == 0, ran.err
        assert it.engine.requests[0][1]["messages"] == ASKED
        wrong = await graft("generate", REVIEWS, "--input", "review", GRAFT_ADDRESS=it.address)
        both = await graft("generate", REVIEWS, "go on", "--input", "review=x", GRAFT_ADDRESS=it.address)
        assert (wrong.code, both.code) == (2, 2)
        assert "is not NAME=TEXT" in wrong.err


# Jobs


async def uploaded(it: Gateway, rows: list[dict[str, Any]], format: "DatasetFormat.ValueType" = 10) -> str:  # type: ignore[assignment]
    async def parts() -> Any:
        header = UploadDatasetRequest.Header(parent="projects/default", display_name="rows", format=format)
        yield UploadDatasetRequest(header=header)
        yield UploadDatasetRequest(chunk="".join(json.dumps(row) + "\n" for row in rows).encode())

    return str((await DatasetServiceStub(it.channel).UploadDataset(parts())).name)


async def created(it: Gateway, dataset: str, **fields: Any) -> FineTuningJob:
    job = FineTuningJob(base_model=BASE, training_dataset=dataset, **fields)
    request = CreateFineTuningJobRequest(parent="projects/default", fine_tuning_job=job)
    made: FineTuningJob = await FineTuningServiceStub(it.channel).CreateFineTuningJob(request)
    return made


def fields_of(error: GraftError) -> dict[str, str]:
    assert isinstance(error, InvalidArgument), error
    return {one.field: one.description for one in error.violations}


async def test_a_job_keeps_the_whole_definition_of_the_task_that_it_names(tmp_path: Path) -> None:
    rows = [{"review": f"film {n}", "sentiment": "positive"} for n in range(3)]
    async with gateway(tmp_path) as it:
        dataset = await uploaded(it, rows)
        named = await created(it, dataset, task="sentiment")
        own = await created(
            it, dataset, task_definition=catalog.text("sentiment").replace("name: sentiment", "name: mine")
        )
        assert load(named.task_definition) == catalog.builtin("sentiment")
        assert (named.task, own.task) == ("sentiment", "mine")
        assert named.WhichOneof("method") == "supervised"


async def test_labels_are_taken_from_the_data_where_the_task_says_so(tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", "label": ("b", "a", None, 1)[n % 4]} for n in range(8)]
    async with gateway(tmp_path) as it:
        job = await created(it, await uploaded(it, rows), task="text-classification")
        assert load(job.task_definition).labels == ("1", "a", "b")
        one = await uploaded(it, rows[:1])
        error = await refused(created(it, one, task="text-classification"))
        assert "1 different values of 'label'; 2 to 256" in fields_of(error)["task"]
        many = await uploaded(it, [{"text": "x", "label": f"label {n}"} for n in range(300)])
        error = await refused(created(it, many, task="text-classification"))
        assert "more than 256 different values" in fields_of(error)["task"]


async def test_a_label_that_first_comes_late_counts(tmp_path: Path) -> None:
    rows = [{"text": "x", "label": "ab"[n % 2]} for n in range(10_001)]
    async with gateway(tmp_path) as it:
        dataset = await uploaded(it, [*rows, {"text": "x", "label": "rare"}])
        job = await created(it, dataset, task="text-classification")
        assert load(job.task_definition).labels == ("a", "b", "rare")
        spaced = await uploaded(it, [*rows[:2], {"text": "x", "label": "b "}])
        error = await refused(created(it, spaced, task="text-classification"))
        assert "'b ' differs from 'b' in white space alone" in fields_of(error)["task"]


async def test_labels_are_told_from_the_upload_without_reading_the_file_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": f"text {n}", "label": "ab"[n % 2]} for n in range(1000)]
    read = 0

    def counting(path: Path) -> Iterator[dict[str, Any]]:
        nonlocal read
        for row in read_rows(path):
            read += 1
            yield row

    monkeypatch.setattr("graft.gateway.checks_tasks.read_rows", counting)
    async with gateway(tmp_path) as it:
        job = await created(it, await uploaded(it, rows), task="text-classification")
        assert load(job.task_definition).labels == ("a", "b")
        assert read == 1


async def test_a_data_set_of_which_an_older_graft_counted_no_labels_is_refused_where_they_are_needed(
    tmp_path: Path,
) -> None:
    async with gateway(tmp_path) as it:
        dataset = (await uploaded(it, [{"text": "x", "label": label} for label in "ab"])).rsplit("/", 1)[-1]
        known = await it.store.get_dataset("default", dataset)
        assert known.labels == {"text": ("x",), "label": ("a", "b")}
        await it.store.create_dataset(replace(known, id="ds-old", labels=None), None)
        error = await refused(created(it, "ds-old", task="text-classification"))
        assert "older Graft that stored it; upload it again" in fields_of(error)["task"]
        own = catalog.builtin("text-classification").with_labels(("a", "b")).to_text()
        assert load((await created(it, "ds-old", task_definition=own)).task_definition).labels == ("a", "b")


async def test_training_goes_on_with_the_task_of_the_version_that_it_starts_from(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        dataset = await uploaded(it, [{"review": "x", "verdict": "yes"}])
        await trained_with(it.store, RAW)
        job = await created(it, dataset, from_adapter=REVIEWS)
        assert (job.task, load(job.task_definition)) == ("raw", load(RAW))
        error = await refused(created(it, dataset, from_adapter=f"{REVIEWS}@1"))
        assert "name a task" in fields_of(error)["training_dataset"]


async def test_a_task_that_cannot_be_used_is_refused_when_the_job_is_created(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        dataset = await uploaded(it, [{"text": "x", "mood": "good"}])
        for given, field, told in (
            ({}, "training_dataset", "name a task"),
            ({"task": "sentment"}, "task", "did you mean 'sentiment'"),
            ({"task": "sentiment"}, "training_dataset", "has no 'review' and no 'sentiment'"),
            ({"task": "sentiment", "task_definition": RAW}, "task", "give one of them"),
            ({"task_definition": "name: x"}, "task_definition.fields", "is missing"),
            ({"task_definition": RAW.replace("{{ review }}", "{{ film }}")}, "task_definition.prompt", "not declared"),
            ({"task_definition": "x" * 8001}, "task_definition", "8000 are allowed"),
        ):
            error = await refused(created(it, dataset, **given))
            assert told in fields_of(error)[field]
        chats = await uploaded(
            it,
            [{"messages": [*ASKED, {"role": "assistant", "content": "positive"}]}],
            DatasetFormat.DATASET_FORMAT_MESSAGES,
        )
        error = await refused(created(it, chats, task="sentiment"))
        assert "hold their prompt already" in fields_of(error)["training_dataset"]
        assert load((await created(it, chats, task="chat")).task_definition).name == "chat"


async def test_rows_whose_answers_are_graded_need_no_answer(tmp_path: Path) -> None:
    grader = ReinforcementMethod(grader=Grader(kind="regex", settings={"pattern": "2"}))
    async with gateway(tmp_path) as it:
        dataset = await uploaded(it, [{"question": "1 + 1?"}])
        job = await created(it, dataset, task="question-answering", reinforcement=grader)
        assert load(job.task_definition).name == "question-answering"
        error = await refused(created(it, dataset, task="question-answering"))
        assert "has no 'answer'" in fields_of(error)["training_dataset"]


async def test_a_grader_that_names_no_field_compares_with_what_the_task_learns(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        dataset = await uploaded(it, [{"review": "x", "sentiment": "positive"}])
        for settings, field in (({}, "sentiment"), ({"field": "review"}, "review")):
            grader = ReinforcementMethod(grader=Grader(kind="exact_match", settings=settings))
            job = await created(it, dataset, task="sentiment", reinforcement=grader)
            assert job.reinforcement.grader.settings["field"] == field
        grader = ReinforcementMethod(grader=Grader(kind="exact_match", settings={"field": "answer"}))
        error = await refused(created(it, dataset, task="sentiment", reinforcement=grader))
        assert fields_of(error)["reinforcement.grader.settings.field"].startswith("is 'answer', which the first row")
        missing = await uploaded(it, [{"review": "x"}])
        grader = ReinforcementMethod(grader=Grader(kind="exact_match"))
        error = await refused(created(it, missing, task="sentiment", reinforcement=grader))
        assert fields_of(error)["reinforcement.grader.settings.field"].startswith("is 'sentiment', which the first row")
