"""Base models and adapters through the public gRPC door: read from the mirror, moved by wishes, put into the engine."""

import asyncio
from pathlib import Path

import pytest

from graft.api.v1 import adapter_pb2, adapter_service_pb2, base_model_service_pb2
from graft.api.v1.adapter_service_pb2_grpc import AdapterServiceStub
from graft.api.v1.base_model_service_pb2_grpc import BaseModelServiceStub
from graft.domain.errors import InvalidArgument, NotFound, Unavailable
from graft.domain.jobs import JobError
from graft.gateway import core
from graft.store.protocol import AliasWish
from tests.support.gateways import BASE, Gateway, gateway, refused, registry

LINE = f"projects/default/baseModels/{BASE}/adapters/reviews"


async def wished(it: Gateway) -> AliasWish:
    while not (wishes := await it.store.pending_alias_wishes()):  # noqa: ASYNC110 - a row, not an event
        await asyncio.sleep(0.01)
    return wishes[0]


async def test_base_models_are_listed_and_unknown_ones_named(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        stub = BaseModelServiceStub(it.channel)
        listed = await stub.ListBaseModels(
            base_model_service_pb2.ListBaseModelsRequest(parent="projects/default", page_size=1)
        )
        assert [model.model for model in listed.base_models] == [BASE]
        assert listed.next_page_token == ""
        assert listed.base_models[0].max_lora_rank == 64
        name = "projects/default/baseModels/gpt-9"
        error = await refused(stub.GetBaseModel(base_model_service_pb2.GetBaseModelRequest(name=name)))
        assert isinstance(error, NotFound)
        assert BASE in error.message


async def test_adapters_and_versions_are_read_by_number_and_alias(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        stub = AdapterServiceStub(it.channel)
        for parent in (f"projects/default/baseModels/{BASE}", "projects/default/baseModels/-"):
            listed = await stub.ListAdapters(adapter_service_pb2.ListAdaptersRequest(parent=parent))
            assert [(one.name, one.model, dict(one.aliases)) for one in listed.adapters] == [
                (LINE, f"{BASE}:reviews", {"champion": 3})
            ]
        versions = await stub.ListAdapterVersions(adapter_service_pb2.ListAdapterVersionsRequest(parent=LINE))
        assert [(one.version, list(one.aliases)) for one in versions.adapter_versions] == [(3, ["champion"]), (1, [])]
        for last in ("3", "champion"):
            name = f"{LINE}/versions/{last}"
            found = await stub.GetAdapterVersion(adapter_service_pb2.GetAdapterVersionRequest(name=name))
            assert found == versions.adapter_versions[0]
        missing = adapter_service_pb2.GetAdapterVersionRequest(name=f"{LINE}/versions/2")
        error = await refused(stub.GetAdapterVersion(missing))
        assert isinstance(error, NotFound)
        assert "3" in error.message


async def test_an_alias_is_set_when_the_registry_has_it(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        request = adapter_service_pb2.SetAdapterAliasRequest(name=LINE, alias="candidate", version=1)
        call = asyncio.ensure_future(AdapterServiceStub(it.channel).SetAdapterAlias(request))
        wish = await asyncio.wait_for(wished(it), 20)
        assert (wish.adapter, wish.alias, wish.version) == ("reviews", "candidate", 1)
        await it.store.finish_alias_wish(wish.id, None)
        await asyncio.sleep(0.2)
        assert not call.done()  # until the read model shows it too
        await it.store.replace_registry(registry({"champion": 3, "candidate": 1}))
        assert dict((await call).aliases) == {"champion": 3, "candidate": 1}


async def test_an_alias_that_somebody_else_moves_at_once_is_told_as_it_is_then(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        stub = AdapterServiceStub(it.channel)
        first = stub.SetAdapterAlias(
            adapter_service_pb2.SetAdapterAliasRequest(name=LINE, alias="candidate", version=1)
        )
        call = asyncio.ensure_future(first)
        wish = await asyncio.wait_for(wished(it), 20)
        # Both were carried out before the first one's caller has looked again.
        await it.store.replace_registry(registry({"champion": 3, "candidate": 3}))
        await it.store.finish_alias_wish(wish.id, None)
        assert dict((await call).aliases) == {"champion": 3, "candidate": 3}


async def test_a_registry_that_refuses_an_alias_is_quoted(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        request = adapter_service_pb2.SetAdapterAliasRequest(name=LINE, alias="candidate", version=1)
        call = asyncio.create_task(refused(AdapterServiceStub(it.channel).SetAdapterAlias(request)))
        wish = await asyncio.wait_for(wished(it), 20)
        await it.store.finish_alias_wish(wish.id, JobError("NOT_FOUND", "VERSION_GONE", "Version 1 was deleted."))
        error = await call
        assert isinstance(error, NotFound)
        assert (error.reason, error.message) == ("VERSION_GONE", "Version 1 was deleted.")


async def test_an_alias_that_nobody_carries_out_is_unavailable_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core, "ALIAS_TIMEOUT_SECONDS", 0.3)
    async with gateway(tmp_path) as it:
        request = adapter_service_pb2.SetAdapterAliasRequest(name=LINE, alias="candidate", version=1)
        error = await refused(AdapterServiceStub(it.channel).SetAdapterAlias(request))
        assert isinstance(error, Unavailable)
        assert error.retry_after_seconds == 5.0
        assert len(await it.store.pending_alias_wishes()) == 1


async def test_illegal_aliases_and_missing_versions_are_refused_before_any_wish(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        stub = AdapterServiceStub(it.channel)
        for alias, version, kind in (
            ("latest", 1, InvalidArgument),
            ("v2", 1, InvalidArgument),
            ("candidate", 0, InvalidArgument),
            ("candidate", 2, NotFound),
        ):
            request = adapter_service_pb2.SetAdapterAliasRequest(name=LINE, alias=alias, version=version)
            assert isinstance(await refused(stub.SetAdapterAlias(request)), kind)
        assert await it.store.pending_alias_wishes() == ()


async def test_a_version_is_loaded_seen_and_unloaded(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        stub = AdapterServiceStub(it.channel)
        name = f"{LINE}/versions/champion"
        loaded = await stub.LoadAdapterVersion(adapter_service_pb2.LoadAdapterVersionRequest(name=name))
        (replica,) = loaded.replicas
        assert (replica.replica, replica.base_model, replica.capacity, replica.ready) == ("fake-1", BASE, 4, True)
        (resident,) = replica.adapters
        assert resident.model == f"{BASE}:reviews@3"
        assert resident.tier == adapter_pb2.ResidentAdapter.TIER_ENGINE
        residency = adapter_service_pb2.GetResidencyRequest(parent="projects/default")
        assert list((await stub.GetResidency(residency)).replicas) == [replica]
        unloaded = await stub.UnloadAdapterVersion(adapter_service_pb2.UnloadAdapterVersionRequest(name=name))
        assert list(unloaded.replicas[0].adapters) == []


async def test_residents_of_another_project_keep_their_names_to_themselves(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        await it.core.load_version("default", BASE, "reviews", "1")
        seen = await AdapterServiceStub(it.channel).GetResidency(
            adapter_service_pb2.GetResidencyRequest(parent="projects/other")
        )
        (resident,) = seen.replicas[0].adapters
        assert resident.model == ""
        assert resident.digest


async def test_an_adapter_that_the_engine_refuses_tells_why(tmp_path: Path) -> None:
    async with gateway(tmp_path) as it:
        it.engine.error = InvalidArgument("adapter_model.safetensors is truncated.", reason="BAD_ADAPTER")
        request = adapter_service_pb2.LoadAdapterVersionRequest(name=f"{LINE}/versions/3")
        error = await refused(AdapterServiceStub(it.channel).LoadAdapterVersion(request))
        assert (error.reason, error.message) == ("BAD_ADAPTER", "adapter_model.safetensors is truncated.")
