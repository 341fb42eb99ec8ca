"""Deployments through the public doors: wishes that are checked, and which engine is asked for which model."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from graft.api.v1 import adapter_service_pb2, base_model_service_pb2, deployment_pb2, generation_service_pb2
from graft.api.v1.adapter_service_pb2_grpc import AdapterServiceStub
from graft.api.v1.base_model_service_pb2_grpc import BaseModelServiceStub
from graft.api.v1.generation_service_pb2_grpc import GenerationServiceStub
from graft.domain.deployments import Deployment, DeploymentState
from graft.domain.errors import AlreadyExists, FailedPrecondition, GraftError, InvalidArgument, NotFound, Unavailable
from graft.domain.jobs import JobError, JobSpec, ServedAs, Tuning
from graft.domain.resources import Adapter, RegistrySnapshot
from graft.internal.v1 import engine_pb2
from tests.support.gateways import BASE, NOW, Gateway, base_model, gateway, refused, registry

OTHER = "other"
NAME = f"projects/default/deployments/{OTHER}"
FULL = f"{BASE}-whole-3"
State = deployment_pb2.Deployment


@asynccontextmanager
async def two_bases(tmp_path: Path) -> AsyncIterator[Gateway]:
    """A gateway whose catalogue has OTHER too, which also has an adapter `reviews@1`, and an engine for it."""
    async with gateway(tmp_path) as it:
        await it.store.replace_base_models([base_model(), replace(base_model(), id=OTHER, digest="sha256:other")])
        mine = registry()
        its = replace(mine.versions[0], base_model=OTHER, digest="sha256:of-other")
        whole = replace(mine.versions[-1], adapter="whole", served_as=ServedAs.MERGED_MODEL, digest="sha256:whole")
        adapters = (
            *mine.adapters,
            Adapter("default", BASE, "whole", {"champion": 3}, 3, NOW),
            Adapter("default", OTHER, "reviews", {"champion": 1}, 1, NOW),
        )
        await it.store.replace_registry(RegistrySnapshot(adapters, (*mine.versions, its, whole)))
        it.engine.others[OTHER] = engine_pb2.Replica(replica="fake-2", base_model=OTHER, capacity=4, ready=True)
        yield it


async def deployed(it: Gateway, model: str, deployment_id: str = "") -> deployment_pb2.Deployment:
    request = base_model_service_pb2.DeployModelRequest(
        parent="projects/default", model=model, deployment_id=deployment_id
    )
    answer: deployment_pb2.Deployment = await BaseModelServiceStub(it.channel).DeployModel(request)
    return answer


async def generated(it: Gateway, model: str) -> str:
    request = generation_service_pb2.GenerateRequest(parent="projects/default", model=model, prompt="hi")
    return str((await GenerationServiceStub(it.channel).Generate(request)).text)


async def unserved(it: Gateway, model: str = OTHER) -> GraftError:
    return await refused(generated(it, model))


async def test_a_deployment_is_asked_for_read_listed_and_taken_back(tmp_path: Path) -> None:
    async with two_bases(tmp_path) as it:
        stub = BaseModelServiceStub(it.channel)
        made = await deployed(it, OTHER)
        assert (made.name, made.model, made.source, made.state) == (NAME, OTHER, OTHER, State.STATE_STARTING)
        assert await deployed(it, OTHER) == made
        assert await stub.GetDeployment(base_model_service_pb2.GetDeploymentRequest(name=NAME)) == made
        listed = await stub.ListDeployments(base_model_service_pb2.ListDeploymentsRequest(parent="projects/default"))
        assert list(listed.deployments) == [made]
        stopping = await stub.UndeployModel(base_model_service_pb2.UndeployModelRequest(name=NAME))
        assert stopping.state == State.STATE_STOPPING
        await it.store.remove_deployment(OTHER)
        error = await refused(stub.GetDeployment(base_model_service_pb2.GetDeploymentRequest(name=NAME)))
        assert isinstance(error, NotFound)


async def test_a_model_is_answered_by_its_own_engine_once_its_deployment_is_ready(tmp_path: Path) -> None:
    async with two_bases(tmp_path) as it:
        error = await unserved(it)
        assert isinstance(error, FailedPrecondition)
        assert (error.reason, error.metadata) == ("BASE_MODEL_NOT_SERVED", {"base_model": OTHER, "served": BASE})
        assert f"graft models deploy {OTHER}" in error.message
        await deployed(it, OTHER)
        starting = await unserved(it, f"{OTHER}:reviews")
        assert isinstance(starting, Unavailable)
        assert starting.retry_after_seconds
        await it.store.move_deployment(OTHER, DeploymentState.READY)
        assert await generated(it, OTHER) == f"[base {OTHER}] hi"
        assert await generated(it, f"{OTHER}:reviews") == f"[{OTHER}:reviews@1] hi"
        assert await generated(it, BASE) == "[base] hi"
        assert [request.base_model for request, _ in it.engine.requests] == [OTHER, OTHER, BASE]
        await it.store.request_undeploy("default", OTHER)
        assert (await unserved(it)).reason == "BASE_MODEL_NOT_SERVED"


async def test_a_request_for_a_failed_deployment_tells_why_it_failed(tmp_path: Path) -> None:
    async with two_bases(tmp_path) as it:
        await deployed(it, OTHER)
        why = JobError("RESOURCE_EXHAUSTED", "NOT_ENOUGH_MEMORY", "It takes 9.0 GiB, and 3.1 GiB are available.")
        await it.store.move_deployment(OTHER, DeploymentState.FAILED, why)
        error = await unserved(it)
        assert isinstance(error, FailedPrecondition)
        assert why.message in error.message
        stub = BaseModelServiceStub(it.channel)
        told = await stub.GetDeployment(base_model_service_pb2.GetDeploymentRequest(name=NAME))
        assert (told.state, told.error.message) == (State.STATE_FAILED, why.message)
        assert (await deployed(it, OTHER)).state == State.STATE_STARTING


async def test_adapters_are_placed_in_the_engine_of_their_base_and_residency_tells_all_engines(tmp_path: Path) -> None:
    async with two_bases(tmp_path) as it:
        stub = AdapterServiceStub(it.channel)
        of_other = f"projects/default/baseModels/{OTHER}/adapters/reviews/versions/1"
        load = adapter_service_pb2.LoadAdapterVersionRequest(name=of_other)
        assert (await refused(stub.LoadAdapterVersion(load))).reason == "BASE_MODEL_NOT_SERVED"
        await deployed(it, OTHER)
        await it.store.move_deployment(OTHER, DeploymentState.READY)
        (replica,) = (await stub.LoadAdapterVersion(load)).replicas
        assert (replica.base_model, replica.adapters[0].model) == (OTHER, f"{OTHER}:reviews@1")
        assert len(it.engine.replica.adapters) == 0
        told = await stub.GetResidency(adapter_service_pb2.GetResidencyRequest(parent="projects/default"))
        assert [(one.base_model, one.ready) for one in told.replicas] == [(BASE, True), (OTHER, True)]
        unload = adapter_service_pb2.UnloadAdapterVersionRequest(name=of_other)
        assert len((await stub.UnloadAdapterVersion(unload)).replicas[0].adapters) == 0
        # As after a restart, before the orchestrator has started it again: another application answers in its place.
        del it.engine.others[OTHER]
        told = await stub.GetResidency(adapter_service_pb2.GetResidencyRequest(parent="projects/default"))
        assert [(one.base_model, one.ready) for one in told.replicas] == [(BASE, True), (OTHER, False)]


async def test_base_models_tell_whether_they_are_served(tmp_path: Path) -> None:
    async with two_bases(tmp_path) as it:
        stub = BaseModelServiceStub(it.channel)
        request = base_model_service_pb2.ListBaseModelsRequest(parent="projects/default")
        await deployed(it, OTHER)
        listed = await stub.ListBaseModels(request)
        assert {one.model: one.served for one in listed.base_models} == {BASE: True, OTHER: False}
        await it.store.move_deployment(OTHER, DeploymentState.READY)
        listed = await stub.ListBaseModels(request)
        assert {one.model: one.served for one in listed.base_models} == {BASE: True, OTHER: True}


async def test_a_full_model_gets_an_id_of_its_own(tmp_path: Path) -> None:
    async with two_bases(tmp_path) as it:
        made = await deployed(it, f"{BASE}:whole")
        assert (made.model, made.source) == (FULL, f"{BASE}:whole@3")
        named = await deployed(it, f"{BASE}:whole@3", "mine")
        assert (named.model, named.source) == ("mine", f"{BASE}:whole@3")
        # Undeployed and asked for again, its id is the catalogue's, and its own.
        origin = f"full model {BASE}:whole@3 of project default"
        await it.store.replace_base_models([base_model(), replace(base_model(), id=FULL, source=origin)])
        assert (await deployed(it, f"{BASE}:whole@3")).model == FULL
        theirs = replace(base_model(), id="theirs", source=origin.replace("default", "another"))
        await it.store.replace_base_models([base_model(), theirs])
        error = await refused(deployed(it, f"{BASE}:whole@3", "theirs"))
        assert isinstance(error, AlreadyExists)
        assert error.reason == "BASE_MODEL_EXISTS"


@pytest.mark.parametrize(
    ("model", "deployment_id", "kind", "told"),
    [
        ("gpt-9", "", NotFound, f"Existing: {OTHER}, {BASE}"),
        (f"{BASE}:reviews@2", "", NotFound, "@3"),
        (f"{BASE}:whole@3", "Not a name", InvalidArgument, "deployment_id: 'Not a name' is not a name"),
        (f"{BASE}:reviews@3", "", FailedPrecondition, "is an adapter"),
        (OTHER, "mine", InvalidArgument, "under its own id"),
        (BASE, "", FailedPrecondition, "always served"),
    ],
)
async def test_a_wish_that_cannot_be_met_is_refused(
    tmp_path: Path, model: str, deployment_id: str, kind: type[GraftError], told: str
) -> None:
    async with two_bases(tmp_path) as it:
        error = await refused(deployed(it, model, deployment_id))
        assert isinstance(error, kind)
        assert told in error.message
        assert await it.store.every_deployment() == ()


async def test_a_full_model_is_its_projects_alone(tmp_path: Path) -> None:
    async with two_bases(tmp_path) as it:
        mine = replace(base_model(), id="mine", project="theirs")
        await it.store.replace_base_models([base_model(), mine])
        await it.store.create_deployment(Deployment("mine", "theirs", f"{BASE}:full@1", NOW, DeploymentState.READY))
        with pytest.raises(NotFound, match=f"Existing: {BASE}\\."):
            await it.core.resolve("default", "mine")
        assert (await it.core.resolve("theirs", "mine")).base == "mine"
        listed = await BaseModelServiceStub(it.channel).ListBaseModels(
            base_model_service_pb2.ListBaseModelsRequest(parent="projects/default")
        )
        assert [one.model for one in listed.base_models] == [BASE]
        assert isinstance(await refused(deployed(it, "mine")), NotFound)
        assert [replica.base_model for replica in await it.core.residency("default")] == [BASE]
        assert [replica.base_model for replica in await it.core.residency("theirs")] == [BASE, "mine"]


async def test_the_stacks_own_base_model_cannot_be_undeployed(tmp_path: Path) -> None:
    async with two_bases(tmp_path) as it:
        request = base_model_service_pb2.UndeployModelRequest(name=f"projects/default/deployments/{BASE}")
        error = await refused(BaseModelServiceStub(it.channel).UndeployModel(request))
        assert isinstance(error, FailedPrecondition)
        assert "GRAFT_SERVING_BASE_MODEL" in error.message


async def test_a_job_whose_result_no_engine_could_prove_is_refused_when_it_is_submitted(tmp_path: Path) -> None:
    async with two_bases(tmp_path) as it:
        async with it.core.begin_upload("default", "rows") as upload:
            await upload.write(b'{"prompt": "a", "completion": "b"}\n')
            data = await upload.finish()
        with pytest.raises(FailedPrecondition, match=f"graft models deploy {OTHER}"):
            await it.core.create_job("default", JobSpec(OTHER, data.id))
        full = JobSpec(OTHER, data.id, tuning=Tuning.FULL, served_as=ServedAs.MERGED_MODEL)
        assert (await it.core.create_job("default", full)).spec.base_model == OTHER
        await deployed(it, OTHER)
        await it.store.move_deployment(OTHER, DeploymentState.READY)
        assert (await it.core.create_job("default", JobSpec(OTHER, data.id))).spec.base_model == OTHER
