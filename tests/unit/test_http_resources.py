"""Graft's own objects over HTTP: what only gRPC told before, with the same checks behind it."""

import asyncio
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from google.protobuf.json_format import ParseDict

from graft.api.v1.task_pb2 import Task
from graft.data.tasks.catalog import builtin, names
from graft.domain.deployments import DeploymentState
from graft.domain.resources import Adapter, RegistrySnapshot
from graft.gateway.convert_tasks import task
from graft.orchestrator.checking import Checker
from tests.support.gateways import BASE, NOW, base_model, registry
from tests.support.http_gateways import HttpGateway, http_gateway
from tests.support.tiny_llama import make_tiny_llama

LINE = f"/v1/adapters/{BASE}:reviews"
ROWS = b"".join(b'{"review": "film %d", "sentiment": "negative"}\n' % number for number in range(4))


async def got(it: HttpGateway, path: str, **query: Any) -> Any:
    answer = await it.raw.get(path, params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    told: dict[str, Any] = answer.json()["error"]
    assert set(told) == {"message", "type", "param", "code"}
    return told


async def test_a_file_is_validated_through_a_task_and_its_report_has_the_contracts_names(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path / "tiny")
    async with http_gateway(tmp_path) as it:
        await it.store.replace_base_models([replace(base_model(), path=str(folder))])
        form = {"purpose": "fine-tune", "format": "fields"}
        file = (await it.raw.post("/v1/files", files={"file": ("a.jsonl", ROWS)}, data=form)).json()
        path = f"/v1/files/{file['id']}/validate"
        checking = asyncio.create_task(Checker(it.store, 0.01).run())
        try:
            body = {"task": "sentiment", "context_tokens": 2000, "validation_dataset": file["id"]}
            report = (await it.raw.post(path, json=body)).json()
        finally:
            checking.cancel()
            with suppress(asyncio.CancelledError):
                await checking
        assert (report["id"], report["object"], report["format"]) == (
            file["id"],
            "dataset_report",
            "DATASET_FORMAT_FIELDS",
        )
        assert (report["task"], report["row_count"], report["leaked"]["count"]) == ("sentiment", "4", "4")
        assert int(report["tokens"]) > 0
        assert report["labels"] == [{"label": "negative", "row_count": "4"}]
        assert error_of(await it.raw.post(path, json={"name": "x"}), 400)["param"] == "name"
        assert "epoch_count" in error_of(await it.raw.post(path, json={"epoch_count": 1}), 400)["message"]
        assert error_of(await it.raw.post(path, json={"task": "nope"}), 400)["param"] == "task"
        absent = error_of(await it.raw.post("/v1/files/ds-none/validate", json={}), 404)
        assert file["id"] in absent["message"]


async def test_base_models_tell_their_facts_and_which_are_served(tmp_path: Path) -> None:
    async with http_gateway(tmp_path) as it:
        await it.store.replace_base_models([base_model(), replace(base_model(), id="other")])
        listed = await got(it, "/v1/base_models", limit=1)
        assert ([one["id"] for one in listed["data"]], listed["has_more"]) == (["other"], True)
        rest = await got(it, "/v1/base_models", after="other")
        assert ([one["id"] for one in rest["data"]], rest["has_more"]) == ([BASE], False)
        found = await got(it, f"/v1/base_models/{BASE}")
        assert found == rest["data"][0]
        assert (found["object"], found["parameter_count"], found["served"]) == ("base_model", "135000000", True)
        assert BASE in error_of(await it.raw.get("/v1/base_models/none"), 404)["message"]


async def test_deployments_are_asked_for_listed_and_taken_back(tmp_path: Path) -> None:
    async with http_gateway(tmp_path) as it:
        await it.store.replace_base_models([base_model(), replace(base_model(), id="other")])
        made = (await it.raw.post("/v1/deployments", json={"model": "other"})).json()
        assert (made["id"], made["object"], made["state"]) == ("other", "deployment", "STATE_STARTING")
        assert await got(it, "/v1/deployments/other") == made
        assert (await got(it, "/v1/deployments"))["data"] == [made]
        assert (await got(it, "/v1/deployments", after="other"))["data"] == []
        assert (await it.raw.post("/v1/deployments", json={"model": "other"})).json() == made
        refused = error_of(await it.raw.post("/v1/deployments", json={"model": BASE}), 409)
        assert refused["code"] == "base_model_served"
        assert error_of(await it.raw.post("/v1/deployments", json={"model": "other", "parent": "x"}), 400)["param"]
        ended = (await it.raw.delete("/v1/deployments/other")).json()
        assert ended["state"] == "STATE_STOPPING"
        stored = await it.store.get_deployment("default", "other")
        assert stored.state is DeploymentState.STOPPING
        assert error_of(await it.raw.put("/v1/deployments/other", json={}), 405)["code"] == "method_not_allowed"


async def test_adapters_and_versions_are_listed_and_read_by_number_and_alias(tmp_path: Path) -> None:
    async with http_gateway(tmp_path) as it:
        (one,) = (await got(it, "/v1/adapters"))["data"]
        assert (one["id"], one["object"], one["aliases"]) == (f"{BASE}:reviews", "adapter", {"champion": 3})
        assert await got(it, LINE) == one
        assert (await got(it, "/v1/adapters", base_model=BASE))["data"] == [one]
        versions = await got(it, f"{LINE}/versions", limit=1)
        assert ([v["id"] for v in versions["data"]], versions["has_more"]) == ([f"{BASE}:reviews@3"], True)
        older = await got(it, f"{LINE}/versions", after=f"{BASE}:reviews@3")
        assert [v["version"] for v in older["data"]] == [1]
        assert (await got(it, "/v1/adapters", after=one["id"], base_model=BASE))["data"] == []
        for path, after in (
            ("/v1/adapters", "nothing"),
            ("/v1/adapters", f"{BASE}:none"),
            (f"{LINE}/versions", f"{BASE}:reviews@2"),
            (f"{LINE}/versions", f"{BASE}:reviews"),
            (f"{LINE}/versions", f"{BASE}:other@3"),
            ("/v1/base_models", "none"),
            ("/v1/deployments", "none"),
            ("/v1/evaluations", "ev-none"),
        ):
            assert error_of(await it.raw.get(path, params={"after": after}), 400)["param"] == "after"
        for selector in ("3", "champion"):
            assert await got(it, f"{LINE}/versions/{selector}") == versions["data"][0]
        assert versions["data"][0]["aliases"] == ["champion"]
        assert "3" in error_of(await it.raw.get(f"{LINE}/versions/2"), 404)["message"]
        for wrong in (BASE, f"{BASE}:reviews@3"):
            assert error_of(await it.raw.get(f"/v1/adapters/{wrong}"), 400)["param"] == "model"
        assert error_of(await it.raw.get("/v1/adapters", params={"base_model": "none"}), 404)


async def test_an_alias_is_put_and_answered_once_the_registry_has_it(tmp_path: Path) -> None:
    async with http_gateway(tmp_path) as it:

        async def registry_confirms() -> None:
            while not (wishes := await it.store.pending_alias_wishes()):  # noqa: ASYNC110 - a row, not an event
                await asyncio.sleep(0.01)
            aliases = {"champion": 3, wishes[0].alias: wishes[0].version}
            moved = (Adapter("default", BASE, "reviews", aliases, 3, NOW),)
            await it.store.replace_registry(RegistrySnapshot(moved, registry().versions))
            await it.store.finish_alias_wish(wishes[0].id, None)

        confirming = asyncio.create_task(registry_confirms())
        answer = await it.raw.put(f"{LINE}/aliases/tested", json={"version": 1})
        await confirming
        assert (answer.status_code, answer.json()["aliases"]) == (200, {"champion": 3, "tested": 1})
        assert error_of(await it.raw.put(f"{LINE}/aliases/v1", json={"version": 1}), 400)["param"] == "alias"
        assert (
            error_of(await it.raw.put(f"{LINE}/aliases/tested", json={"version": "x"}), 400)["code"] == "invalid_alias"
        )
        assert error_of(await it.raw.put(f"{LINE}/aliases/tested", json={"version": 9}), 404)


async def test_versions_are_loaded_and_unloaded_and_what_replicas_hold_is_told(tmp_path: Path) -> None:
    async with http_gateway(tmp_path) as it:
        loaded = (await it.raw.post(f"{LINE}/versions/champion/load")).json()
        assert [one["model"] for one in loaded["data"][0]["adapters"]] == [f"{BASE}:reviews@3"]
        assert (await got(it, "/v1/residency"))["data"] == loaded["data"]
        unloaded = (await it.raw.post(f"{LINE}/versions/3/unload")).json()
        assert "adapters" not in unloaded["data"][0]


async def test_tasks_are_listed_with_the_definition_that_a_job_takes(tmp_path: Path) -> None:
    async with http_gateway(tmp_path) as it:
        listed = (await got(it, "/v1/tasks"))["data"]
        assert [one["id"] for one in listed] == list(names())
        found = await got(it, "/v1/tasks/sentiment")
        assert (found["labels"], found["definition"]) == (["positive", "negative"], builtin("sentiment").to_text())
        message = ParseDict({key: found[key] for key in found.keys() - {"id", "object"}}, Task())
        assert message == task("default", builtin("sentiment"))
        assert "sentiment" in error_of(await it.raw.get("/v1/tasks/nope"), 404)["message"]


@pytest.mark.parametrize(
    "path", ["/v1/tasks", "/v1/base_models", "/v1/deployments", "/v1/adapters", "/v1/residency", f"{LINE}/versions"]
)
async def test_every_list_demands_a_key_beyond_loopback(path: str, tmp_path: Path) -> None:
    async with http_gateway(tmp_path, guarded=True) as it:
        assert error_of(await it.raw.get(path), 401)["code"] == "invalid_api_key"
