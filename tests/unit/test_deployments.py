"""The orchestrator's part of deployments: wishes become applications, once, and each tells how it went."""

import asyncio
import json
import shutil
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from graft.domain.deployments import Deployment, DeploymentState
from graft.domain.errors import FailedPrecondition, GraftError, ResourceExhausted, Unavailable
from graft.domain.resources import BaseModel
from graft.internal.v1 import engine_pb2
from graft.orchestrator.catalogue import Catalogue
from graft.orchestrator.deployments import BACK_SECONDS, Deployments
from graft.registry.base_models import load_catalog
from graft.settings import Settings
from tests.support.orchestration import BASE, LOGPROB, NOW, PROJECT, FakeScorer, World, world

State = engine_pb2.Application


@dataclass
class FakeService:
    """The inference service: applications that are ready at once, unless `start_error` or `refusal` say otherwise."""

    scorer: FakeScorer
    there: dict[str, BaseModel] = field(default_factory=dict)
    deploys: list[str] = field(default_factory=list)
    refusal: GraftError | None = None
    start_error: str = ""
    ready: bool = True
    away: bool = False
    slow: set[str] = field(default_factory=set)
    """Base models whose engines are not ready."""
    stuck: set[str] = field(default_factory=set)
    """Base models whose engines do not end."""
    ending: list[str] = field(default_factory=list)
    base: str = ""

    def of(self, base: str) -> "FakeService":
        return replace(self, base=base)

    def _answer(self) -> None:
        if self.away:
            raise Unavailable("The inference service is starting.", reason="ENGINE_STARTING")

    async def deploy(self, model: BaseModel) -> None:
        self._answer()
        self.deploys.append(model.id)
        if self.refusal is not None:
            raise self.refusal
        self.there[model.id] = model

    async def undeploy(self, base: str) -> None:
        self._answer()
        self.ending.append(base)
        while base in self.stuck:  # noqa: ASYNC110 - a test moves it
            await asyncio.sleep(0.01)
        self.there.pop(base, None)

    async def applications(self) -> list[engine_pb2.Application]:
        self._answer()
        return [State(base_model=base, state=State.STATE_RUNNING) for base in ("first", *self.there)]

    async def residency(self) -> engine_pb2.ResidencyResponse:
        self._answer()
        ready = self.ready and not self.start_error and self.base not in self.slow
        replica = engine_pb2.Replica(base_model=self.base, ready=ready, start_error=self.start_error)
        return engine_pb2.ResidencyResponse(replicas=[replica])

    async def generate(
        self, request: engine_pb2.GenerateRequest, timeout_seconds: float
    ) -> engine_pb2.GenerateResponse:
        assert not request.HasField("adapter")
        return await self.scorer.generate(request, timeout_seconds)


class FakeModels:
    """A registry with one full model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pulled: list[tuple[str, int, str]] = []

    def pull_model(self, registered_model: str, version: int, digest: str) -> Path:
        self.pulled.append((registered_model, version, digest))
        if version == 1:
            raise FailedPrecondition("Version 1 is an adapter.", reason="NO_FULL_MODEL")
        return self.folder


@dataclass
class Scene:
    it: World
    service: FakeService
    models: FakeModels
    settings: Settings

    async def wish(self, base: str, source: str = "") -> None:
        await self.it.store.create_deployment(Deployment(base, PROJECT, source or base, NOW))

    async def until(self, base: str, state: DeploymentState | None) -> Deployment | None:
        """Waits for a state, or for the end when None."""
        found: Deployment | None = None

        async def seen() -> bool:
            nonlocal found
            found = await self.it.store.find_deployment(base)
            return (found.state if found else None) is state

        await _until(seen)
        return found

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async def refresh() -> None:
            await Catalogue(self.it.store, self.settings).refresh()

        deployments = Deployments(self.it.store, self.service, self.models, refresh, self.settings, 0.01)
        task = asyncio.create_task(deployments.run())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


async def _until(condition: Callable[[], Awaitable[bool]]) -> None:
    deadline = time.monotonic() + 10
    while not await condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


@asynccontextmanager
async def scene(folder: Path) -> AsyncIterator[Scene]:
    async with world(folder) as it:
        yield Scene(it, FakeService(it.engine), FakeModels(folder / "pulled"), it.parts.settings)


async def test_a_wish_becomes_an_application_that_is_ready_and_goes_when_it_is_undeployed(tmp_path: Path) -> None:
    async with scene(tmp_path) as on, on.running():
        await on.wish(BASE)
        await on.until(BASE, DeploymentState.READY)
        assert on.service.deploys == [BASE]
        await on.it.store.request_undeploy(PROJECT, BASE)
        await on.until(BASE, None)
        assert on.service.there == {}


@pytest.mark.parametrize("what", ["refusal", "start_error"])
async def test_a_deployment_that_fails_tells_why_holds_nothing_and_is_not_tried_again(
    tmp_path: Path, what: str
) -> None:
    async with scene(tmp_path) as on, on.running():
        if what == "refusal":
            on.service.refusal = ResourceExhausted("No memory for it: 9.0 GiB.", reason="NOT_ENOUGH_MEMORY")
        else:
            on.service.start_error = "No memory for it: 9.0 GiB."
        await on.wish(BASE)
        failed = await on.until(BASE, DeploymentState.FAILED)
        assert failed is not None
        assert failed.error is not None
        assert "No memory for it: 9.0 GiB." in failed.error.message
        assert on.service.there == {}
        await asyncio.sleep(0.1)
        assert on.service.deploys == [BASE]
        on.service.refusal, on.service.start_error = None, ""
        await on.wish(BASE)
        await on.until(BASE, DeploymentState.READY)


async def test_what_was_there_is_started_again_after_the_inference_service_was_restarted(tmp_path: Path) -> None:
    async with scene(tmp_path) as on, on.running():
        await on.wish(BASE)
        await on.until(BASE, DeploymentState.READY)
        on.service.away = True
        await asyncio.sleep(0.05)
        on.service.ready = False
        on.service.there.clear()
        on.service.away = False
        await on.until(BASE, DeploymentState.STARTING)
        on.service.ready = True
        await on.until(BASE, DeploymentState.READY)
        assert on.service.deploys == [BASE, BASE]


@pytest.mark.parametrize("comes", [True, False])
async def test_what_was_there_waits_for_nodes_that_come_back_later_than_the_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, comes: bool
) -> None:
    now = [0.0]
    monkeypatch.setattr("graft.orchestrator.deployments.time", SimpleNamespace(monotonic=lambda: now[0]))
    async with scene(tmp_path) as on, on.running():
        await on.wish(BASE)
        await on.until(BASE, DeploymentState.READY)
        on.service.refusal = FailedPrecondition("Its nodes have no GPU.", reason="NO_NODES")
        on.service.there.clear()

        async def refused_twice() -> bool:
            return len(on.service.deploys) >= 3

        await _until(refused_twice)
        if comes:
            await on.until(BASE, DeploymentState.STARTING)
            on.service.refusal = None
            await on.until(BASE, DeploymentState.READY)
        else:
            now[0] += BACK_SECONDS
            failed = await on.until(BASE, DeploymentState.FAILED)
            assert failed is not None
            assert failed.error is not None
            assert failed.error.reason == "NO_NODES"


async def test_a_start_that_ends_while_a_turn_looks_around_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scene(tmp_path) as on:
        deployments = Deployments(on.it.store, on.service, on.models, _nothing, on.settings, 0.01)
        await on.wish(BASE)
        await deployments.reconcile()
        read = on.it.store.every_deployment

        async def slow() -> tuple[Deployment, ...]:
            rows = await read()
            await on.until(BASE, DeploymentState.READY)
            await asyncio.sleep(0.05)
            return rows

        monkeypatch.setattr(on.it.store, "every_deployment", slow)
        await deployments.reconcile()
        await asyncio.sleep(0.1)
        assert on.service.deploys == [BASE]
        await on.until(BASE, DeploymentState.READY)


async def _nothing() -> None:
    """A catalogue without news."""


async def test_an_orchestrator_that_was_restarted_leaves_a_ready_deployment_alone(tmp_path: Path) -> None:
    async with scene(tmp_path) as on:
        async with on.running():
            await on.wish(BASE)
            await on.until(BASE, DeploymentState.READY)
        async with on.running():
            await asyncio.sleep(0.1)
        assert on.service.deploys == [BASE]


async def test_a_deployment_is_undeployed_while_it_starts(tmp_path: Path) -> None:
    async with scene(tmp_path) as on, on.running():
        on.service.ready = False
        await on.wish(BASE)

        async def asked() -> bool:
            return BASE in on.service.there

        await _until(asked)
        await on.it.store.request_undeploy(PROJECT, BASE)
        await on.until(BASE, None)
        assert on.service.there == {}


OTHER = "other"


async def _two_bases(on: Scene) -> None:
    base = await on.it.store.get_base_model(BASE)
    await on.it.store.replace_base_models([base, replace(base, id=OTHER)])


async def test_an_engine_that_never_gets_ready_holds_up_no_other_and_fails_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graft.orchestrator.deployments.TURN_SECONDS", 0.05)
    monkeypatch.setattr("graft.orchestrator.deployments.START_SECONDS", 0.5)
    async with scene(tmp_path) as on, on.running():
        await _two_bases(on)
        on.service.slow.add(BASE)
        await on.wish(BASE)

        async def asked() -> bool:
            return on.service.deploys == [BASE]

        await _until(asked)
        await on.wish(OTHER)
        await on.until(OTHER, DeploymentState.READY)
        failed = await on.until(BASE, DeploymentState.FAILED)
        assert failed is not None
        assert failed.error is not None
        assert failed.error.reason == "ENGINE_START_TIMEOUT"
        assert list(on.service.there) == [OTHER]


async def test_an_engine_that_does_not_end_holds_up_no_other(tmp_path: Path) -> None:
    async with scene(tmp_path) as on, on.running():
        await _two_bases(on)
        await on.wish(BASE)
        await on.until(BASE, DeploymentState.READY)
        on.service.stuck.add(BASE)
        await on.it.store.request_undeploy(PROJECT, BASE)

        async def asked() -> bool:
            return on.service.ending == [BASE]

        await _until(asked)
        await on.wish(OTHER)
        await on.until(OTHER, DeploymentState.READY)
        assert BASE in on.service.there
        on.service.stuck.clear()
        await on.until(BASE, None)


async def test_a_full_queue_of_the_inference_service_fails_no_deployment(tmp_path: Path) -> None:
    async with scene(tmp_path) as on, on.running():
        on.service.refusal = ResourceExhausted("Its queue is full.", reason="ENGINE_LIMIT")
        await on.wish(BASE)

        async def asked_twice() -> bool:
            return len(on.service.deploys) >= 2

        await _until(asked_twice)
        on.service.refusal = None
        await on.until(BASE, DeploymentState.READY)


def _hollow_model(folder: Path) -> None:
    """As much of a model as the catalogue reads."""
    folder.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "max_position_embeddings": 512}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))


async def _full_model(on: Scene, mean_logprob: float) -> None:
    """Versions 1, an adapter, and 2, a full model with one probe, in the read model."""
    for job in ("job-1", "job-2"):
        on.it.registry.add(BASE, "full", job)
    await on.it.store.replace_registry(on.it.registry.snapshot())
    _hollow_model(on.models.folder)
    probe = {"prompt_token_ids": [1, 2], "completion_token_ids": [3], "mean_logprob": mean_logprob}
    (on.models.folder / "graft.json").write_text(json.dumps({"dtype": "float32", "probes": [probe]}))
    # The catalogue replaces the store's list: the base that the model was trained from must be in it.
    home = on.settings.home.path
    (home / "base_models.yaml").write_text(yaml.safe_dump({BASE: {"folder": str(on.models.folder), "license": "MIT"}}))


async def test_a_full_model_becomes_a_base_model_of_the_catalogue_once_it_is_proven(tmp_path: Path) -> None:
    async with scene(tmp_path) as on, on.running():
        await _full_model(on, LOGPROB)
        await on.wish("tiny-full-2", "tiny:full@2")
        await on.until("tiny-full-2", DeploymentState.READY)
        assert on.models.pulled == [("default--tiny--full", 2, "sha256:job-2")]
        model = await on.it.store.get_base_model("tiny-full-2")
        assert model.project == PROJECT
        assert model.source == "full model tiny:full@2 of project default"
        assert Path(model.path) == on.settings.home.path / "base_models" / "tiny-full-2"
        assert model.digest == on.service.there["tiny-full-2"].digest
        assert [body["model"] for body in on.it.engine.bodies] == ["tiny-full-2"]
        await on.it.store.request_undeploy(PROJECT, "tiny-full-2")
        await on.until("tiny-full-2", None)
        await on.wish("tiny-full-2", "tiny:full@2")
        await on.until("tiny-full-2", DeploymentState.READY)
        assert len(on.models.pulled) == 1  # it is a base model by now, and needs no registry


async def test_a_full_model_that_is_served_stays_when_an_orchestrator_with_a_home_of_its_own_goes_on(
    tmp_path: Path,
) -> None:
    async with scene(tmp_path) as on:
        async with on.running():
            await _full_model(on, LOGPROB)
            catalogue = (on.settings.home.path / "base_models.yaml").read_text()
            await on.wish("tiny-full-2", "tiny:full@2")
            await on.until("tiny-full-2", DeploymentState.READY)
        model = await on.it.store.get_base_model("tiny-full-2")
        # The next one's home, on another host.
        (on.settings.home.path / "base_models.yaml").write_text(catalogue)
        shutil.rmtree(model.path)
        await Catalogue(on.it.store, on.settings).refresh()
        assert await on.it.store.get_base_model("tiny-full-2") == model
        async with on.running():

            async def has_it() -> bool:
                return "tiny-full-2" in {one.id for one in load_catalog(on.settings)}

            await _until(has_it)
            found = await on.until("tiny-full-2", DeploymentState.READY)
        assert found is not None
        assert on.service.deploys == ["tiny-full-2"]  # its engine answers all the while
        assert (await on.it.store.get_base_model("tiny-full-2")).digest == model.digest


async def test_a_full_model_that_cannot_be_fetched_again_is_not_asked_for_at_every_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def away(registered_model: str, version: int, digest: str) -> Path:
        del version, digest
        asked.append(registered_model)
        raise Unavailable("MLflow does not answer.", reason="REGISTRY_UNAVAILABLE")

    async with scene(tmp_path) as on:
        async with on.running():
            await _full_model(on, LOGPROB)
            await on.wish("tiny-full-2", "tiny:full@2")
            await on.until("tiny-full-2", DeploymentState.READY)
        shutil.rmtree((await on.it.store.get_base_model("tiny-full-2")).path)
        monkeypatch.setattr(on.models, "pull_model", away)
        deployments = Deployments(on.it.store, on.service, on.models, _nothing, on.settings, 0.01)
        for _ in range(3):
            await deployments.reconcile()
            await asyncio.wait(deployments._starting.values())
        assert asked == ["default--tiny--full"]
        found = await on.it.store.find_deployment("tiny-full-2")
        assert found is not None
        assert found.state is DeploymentState.READY


async def test_an_engine_that_computes_something_else_than_was_trained_is_not_left_to_answer(tmp_path: Path) -> None:
    async with scene(tmp_path) as on, on.running():
        await _full_model(on, LOGPROB - 0.3)
        await on.wish("tiny-full-2", "tiny:full@2")
        failed = await on.until("tiny-full-2", DeploymentState.FAILED)
        assert failed is not None
        assert failed.error is not None
        assert failed.error.reason == "PARITY_FAILED"
        assert on.service.there == {}


async def test_a_version_without_a_full_model_fails_with_the_registrys_reason(tmp_path: Path) -> None:
    async with scene(tmp_path) as on, on.running():
        await _full_model(on, LOGPROB)
        await on.wish("tiny-full-1", "tiny:full@1")
        failed = await on.until("tiny-full-1", DeploymentState.FAILED)
        assert failed is not None
        assert failed.error is not None
        assert failed.error.reason == "NO_FULL_MODEL"
