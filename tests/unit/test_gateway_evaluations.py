"""Evaluations through the gRPC and the HTTP door, up to where an orchestrator takes them."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from graft.api.v1 import evaluation_pb2, evaluation_service_pb2
from graft.api.v1.evaluation_service_pb2_grpc import EvaluationServiceStub
from graft.domain.evaluations import EvaluationState
from tests.support.gateways import BASE, Gateway, gateway, refused
from tests.support.http_gateways import http_gateway
from tests.unit.test_gateway_jobs import uploaded

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
        assert await stub.GetEvaluation(evaluation_service_pb2.GetEvaluationRequest(name=made.name)) == made
        page = await stub.ListEvaluations(evaluation_service_pb2.ListEvaluationsRequest(parent="projects/default"))
        assert list(page.evaluations) == [made]
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
        asked.shots_dataset = dataset
        assert "would be shown" in (await refused(created(it, asked))).message


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
