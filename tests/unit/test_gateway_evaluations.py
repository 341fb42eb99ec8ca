"""Evaluations through the gRPC and the HTTP door, up to where an orchestrator takes them."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from graft.api.v1 import evaluation_pb2, evaluation_service_pb2
from graft.api.v1.dataset_pb2 import DatasetFormat as Format
from graft.api.v1.dataset_service_pb2 import DeleteDatasetRequest
from graft.api.v1.dataset_service_pb2_grpc import DatasetServiceStub
from graft.api.v1.evaluation_service_pb2_grpc import EvaluationServiceStub
from graft.data.tasks import catalog
from graft.data.tasks.definition import load
from graft.domain.evaluations import EvaluationState
from tests.support.gateways import BASE, Gateway, gateway, refused
from tests.support.http_gateways import http_gateway
from tests.unit.test_gateway_jobs import uploaded
from tests.unit.test_gateway_tasks import trained_with
from tests.unit.test_gateway_tasks import uploaded as upload_rows

Evaluation = evaluation_pb2.Evaluation


def evaluation(dataset: str, *models: str, **fields: Any) -> Any:
    contestants = [evaluation_pb2.Contestant(model=model) for model in models or (BASE, f"{BASE}:reviews")]
    return Evaluation(dataset=dataset, contestants=contestants, **fields)


async def created(it: Gateway, asked: Any, request_id: str = "") -> Any:
    request = evaluation_service_pb2.CreateEvaluationRequest(
        parent="projects/default", evaluation=asked, request_id=request_id
    )
    return await EvaluationServiceStub(it.channel).CreateEvaluation(request)


async def test_an_evaluation_is_queued_with_versions_in_the_place_of_aliases(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        made = await created(it, evaluation(await uploaded(it), metrics=["accuracy", "macro_f1"]), "r-1")
        assert [one.model for one in made.contestants] == [BASE, f"{BASE}:reviews@3"]
        assert (made.state, list(made.metrics)) == (Evaluation.STATE_QUEUED, ["accuracy", "macro_f1"])
        stub = EvaluationServiceStub(it.channel)
        assert await created(it, evaluation(made.dataset), "r-1") == made
        assert await created(it, evaluation("ds-gone"), "r-1") == made  # whatever has changed since
        assert await stub.GetEvaluation(evaluation_service_pb2.GetEvaluationRequest(name=made.name)) == made
        page = await stub.ListEvaluations(evaluation_service_pb2.ListEvaluationsRequest(parent="projects/default"))
        assert list(page.evaluations) == [made]
        shown = DeleteDatasetRequest(name=await uploaded(it, b'{"prompt": "another?", "completion": "yes"}'))
        second = evaluation(made.dataset, shots_dataset=shown.name)
        second.contestants[0].shots = 1
        second = await created(it, second)
        for used, users in ((made.dataset, (made, second)), (shown.name, (second,))):
            error = await refused(DatasetServiceStub(it.channel).DeleteDataset(DeleteDatasetRequest(name=used)))
            assert (error.code, error.reason) == ("FAILED_PRECONDITION", "DATASET_IN_USE")
            assert all(user.name.rsplit("/", 1)[1] in error.message for user in users)
        await stub.CancelEvaluation(evaluation_service_pb2.CancelEvaluationRequest(name=second.name))
        await it.store.end_cancelled_evaluations()
        await DatasetServiceStub(it.channel).DeleteDataset(shown)
        cancelled = await stub.CancelEvaluation(evaluation_service_pb2.CancelEvaluationRequest(name=made.name))
        assert cancelled.cancel_requested
        error = await refused(
            stub.GetEvaluationReport(evaluation_service_pb2.GetEvaluationReportRequest(name=made.name))
        )
        assert (error.code, error.reason) == ("FAILED_PRECONDITION", "NO_REPORT")


@pytest.mark.parametrize(
    ("models", "fields", "field", "told"),
    [
        ((), {"metrics": ["acuracy"]}, "metrics[0]", "'acuracy' is not a metric; use: accuracy"),
        ((), {"metrics": ["perplexity"]}, "metrics[0]", "cannot be computed from prompt_completion rows"),
        ((), {"metrics": ["accuracy", "accuracy"]}, "metrics[1]", "twice"),
        ((BASE, BASE), {}, "contestants[1]", f"{BASE} is there twice"),
        (("No Name",), {}, "contestants[0].model", "is not a name"),
        ((), {"samples": 4}, "samples", "says nothing about prompt_completion rows"),
        ((), {"max_rows": -1}, "max_rows", "outside"),
        ((), {"metrics": ["accuracy"] * 500}, "metrics", "are 500; there are 15 different ones"),
        ((BASE,) * 500, {}, "contestants", "are 500; give 1 to 16"),
        ((), {"display_name": "a\nb"}, "display_name", "control characters"),
        ((), {"grader": {"kind": "numeric"}}, "grader", "says nothing"),
    ],
)
async def test_what_cannot_be_evaluated_is_refused_naming_the_field(
    tmp_path: Path, models: tuple[str, ...], fields: dict[str, Any], field: str, told: str
) -> None:
    async with gateway(tmp_path) as it:
        error = await refused(created(it, evaluation(await uploaded(it), *models, **fields)))
        assert error.code == "INVALID_ARGUMENT"
        assert [fault.field for fault in error.violations] == [field]
        assert told in error.violations[0].description


async def test_names_that_do_not_exist_are_told_together_with_what_does(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        error = await refused(created(it, evaluation("ds-9", "other", f"{BASE}:reviews@2")))
        assert error.code == "NOT_FOUND"
        assert [fault.field for fault in error.violations] == [
            "dataset",
            "contestants[0].model",
            "contestants[1].model",
        ]
        assert f"{BASE}:reviews@3" in error.message


async def test_shots_need_data_of_their_own(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        dataset = await uploaded(it)
        asked = Evaluation(dataset=dataset, contestants=[evaluation_pb2.Contestant(model=BASE, shots=4)])
        error = await refused(created(it, asked))
        assert "shots_dataset: is required" in error.message
        for same in (dataset, await uploaded(it)):
            asked.shots_dataset = same
            assert "would be shown" in (await refused(created(it, asked))).message


LINES = {
    "pairs": (Format.DATASET_FORMAT_PREFERENCE, {"prompt": "p", "chosen": "a", "rejected": "b"}),
    "texts": (Format.DATASET_FORMAT_TEXT, {"text": "Once upon a time."}),
    "raw": (Format.DATASET_FORMAT_PROMPT_COMPLETION, {"prompt": "p", "completion": "c"}),
    "chat": (Format.DATASET_FORMAT_QUESTION_ANSWER, {"question": "q", "answer": "a"}),
    "graded": (Format.DATASET_FORMAT_GRADED_PROMPTS, {"prompt": "p", "answer": "a"}),
    "graded chat": (
        Format.DATASET_FORMAT_GRADED_PROMPTS,
        {"messages": [{"role": "user", "content": "q"}], "answer": "a"},
    ),
    "fields": (Format.DATASET_FORMAT_FIELDS, {"review": "Fine", "sentiment": "positive"}),
}


async def stored(it: Gateway, kind: str, count: int = 4) -> str:
    format, row = LINES[kind]
    return await upload_rows(it, [row] * count, format)


@pytest.mark.parametrize(
    ("asked", "shown", "fields", "field", "told"),
    [
        ("pairs", "raw", {}, "contestants[1].shots", "are 2, and of preference rows"),
        ("texts", "raw", {}, "contestants[1].shots", "are 2, and of text rows"),
        ("raw", "texts", {}, "shots_dataset", "text rows, which hold no answers"),
        ("raw", "graded", {}, "shots_dataset", "graded_prompts rows, which hold no answers"),
        ("raw", "chat", {}, "shots_dataset", "turns of a chat, and those of the dataset are raw text"),
        ("chat", "raw", {}, "shots_dataset", "raw text, and those of the dataset are turns of a chat"),
        ("graded", "chat", {"grader": {"kind": "exact_match"}}, "shots_dataset", "of the dataset are raw text"),
        ("graded chat", "raw", {"grader": {"kind": "exact_match"}}, "shots_dataset", "are turns of a chat: the one"),
        ("fields", "raw", {"task": "sentiment"}, "shots_dataset", "hold their prompt already"),
        ("fields", "chat", {"task": "sentiment"}, "shots_dataset", "has no 'review' and no 'sentiment'"),
    ],
)
async def test_shots_that_could_not_be_shown_are_refused(
    tmp_path: Path, asked: str, shown: str, fields: dict[str, Any], field: str, told: str
) -> None:
    contestants = [evaluation_pb2.Contestant(model=BASE), evaluation_pb2.Contestant(model=BASE, shots=2)]
    async with gateway(tmp_path) as it:
        given = Evaluation(
            dataset=await stored(it, asked), shots_dataset=await stored(it, shown), contestants=contestants, **fields
        )
        error = await refused(created(it, given))
        assert [fault.field for fault in error.violations] == [field]
        assert told in error.violations[0].description


async def test_shots_of_the_same_kind_are_taken_up_to_the_rows_that_there_are(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        for asked, shown, fields in (
            ("raw", "raw", {}),
            ("graded", "raw", {"grader": {"kind": "exact_match"}}),
            ("graded chat", "chat", {"grader": {"kind": "exact_match"}}),
            ("fields", "fields", {"task": "sentiment"}),
        ):
            given = evaluation(await stored(it, asked, 6), BASE, shots_dataset=await stored(it, shown), **fields)
            given.contestants[0].shots = 4
            assert (await created(it, given)).contestants[0].shots == 4
            given.contestants[0].shots = 5
            error = await refused(created(it, given))
            assert "has 4 rows, and 5 shots are asked for" in error.message


async def test_a_metric_of_more_samples_than_are_taken_is_refused(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        dataset, grader = await stored(it, "graded"), {"kind": "exact_match"}
        for samples, told in ((0, "samples is 1"), (4, "samples is 4")):
            given = evaluation(dataset, grader=grader, samples=samples, metrics=["pass_at_1", "pass_at_5"])
            error = await refused(created(it, given))
            assert [fault.field for fault in error.violations] == ["metrics[1]"]
            assert f"'pass_at_5' needs 5 samples or more of each prompt; {told}" in error.message
        await created(it, evaluation(dataset, grader=grader, samples=5, metrics=["pass_at_1", "pass_at_5"]))


async def test_rows_of_fields_are_graded_through_a_task(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        dataset = await stored(it, "fields", 6)
        given = evaluation(
            dataset, BASE, task="sentiment", grader={"kind": "exact_match"}, samples=5, metrics=["pass_at_5"]
        )
        made = await created(it, given)
        assert (made.grader.settings["field"], load(made.task_definition).name) == ("sentiment", "sentiment")
        given.contestants[0].shots = 4
        given.shots_dataset = await stored(it, "fields", 4)
        assert (await created(it, given)).contestants[0].shots == 4
        for fields, field, told in (
            ({"grader": {"kind": "python_tests"}}, "grader.settings.field", "is 'tests', which the first row"),
            ({"grader": {"kind": "exact_match"}, "metrics": ["accuracy"]}, "metrics[0]", "use: pass_at_1"),
            ({"samples": 4}, "samples", "says nothing about fields rows"),
        ):
            error = await refused(created(it, evaluation(dataset, BASE, task="sentiment", **fields)))
            assert [fault.field for fault in error.violations] == [field]
            assert told in error.violations[0].description
        error = await refused(created(it, evaluation(dataset, BASE, grader={"kind": "exact_match"})))
        assert "need a task's template" in error.message


async def test_labels_from_the_data_are_those_of_its_shots_too(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        asked = await upload_rows(it, [{"text": "x", "label": label} for label in ("a", "b")])
        shown = await upload_rows(it, [{"text": "x", "label": label} for label in ("a", "b", "c")])
        made = await created(it, evaluation(asked, BASE, task="text-classification", shots_dataset=shown))
        assert load(made.task_definition).labels == ("a", "b", "c")


async def test_labels_from_the_data_are_those_that_the_models_were_trained_with_too(tmp_path: Path) -> None:
    trained = catalog.builtin("text-classification").with_labels(("a", "b", "z"))
    async with gateway(tmp_path) as it:
        await trained_with(it.store, trained.to_text())
        asked = await upload_rows(it, [{"text": "x", "label": label} for label in ("a", "b")])
        made = await created(it, evaluation(asked, task="text-classification"))
        assert load(made.task_definition) == trained
        alone = await created(it, evaluation(asked, BASE, task="text-classification"))
        assert load(alone.task_definition).labels == ("a", "b")
        await trained_with(it.store, "name: from-the-future\nshape: round\n")
        assert load((await created(it, evaluation(asked, task="text-classification"))).task_definition).labels == (
            "a",
            "b",
        )


async def test_the_same_over_http_with_the_report_once_it_has_succeeded(tmp_path: Path) -> None:
    async with http_gateway(tmp_path) as it:
        client = it.raw
        rows = b'{"prompt": "good?", "completion": "yes"}\n'
        file = (await client.post("/v1/files", files={"file": ("a.jsonl", rows)}, data={"purpose": "fine-tune"})).json()
        body = {"dataset": file["id"], "contestants": [{"model": BASE}]}
        made = (await client.post("/v1/evaluations", json=body)).json()
        assert (made["object"], made["state"]) == ("evaluation", "STATE_QUEUED")
        path = f"/v1/evaluations/{made['id']}"
        assert (await client.get(path)).json() == made
        assert (await client.get("/v1/evaluations")).json()["data"] == [made]
        assert (await client.get(f"{path}/report")).json()["error"]["code"] == "no_report"
        wrong = (await client.post("/v1/evaluations", json={**body, "metrix": []})).json()
        assert "metrix" in wrong["error"]["message"]

        taken = await it.store.claim_evaluation("me", timedelta(seconds=30))
        assert taken is not None
        await it.store.end_evaluation(taken, "me", EvaluationState.SUCCEEDED, verdicts=["Nobody wins."])
        folder = it.settings.evaluation_dir("default", made["id"])
        folder.mkdir(parents=True)
        (folder / "report.html").write_text("<p>Nobody wins.")
        shown = await client.get(f"{path}/report")
        assert (shown.text, shown.headers["content-type"]) == ("<p>Nobody wins.", "text/html; charset=utf-8")
        assert (await client.post(f"{path}/cancel")).status_code == 409
