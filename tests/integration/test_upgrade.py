"""An upgrade, a rollback, and a training cluster that is made anew, each in the middle of a job: nothing is lost.

The newer version is `tests.support.newer_graft`: this one, with a column and fields that this one does not know.
"""

import asyncio
import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio
from sqlalchemy import text

from graft.api.v1.fine_tuning_job_pb2 import FineTuningJob
from graft.client import Connection, Graft
from graft.registry.mlflow_registry import Registry
from tests.support.mlflow_server import mlflow_server
from tests.support.newer_graft import FIELD, sync_engine
from tests.support.processes import held, listening, slowed
from tests.support.scoring_engine import served
from tests.support.tiny_jobs import sums, write_rows
from tests.support.tiny_llama import make_tiny_llama
from tests.support.upgrades import BASE, STREAMED, HeldEngine, Pod, Release, release, until

pytestmark = [
    pytest.mark.integration,
    pytest.mark.ray,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(500),
]

STEPS = 600
STEPS_ANEW = 200
"""Some seconds: the cluster ends at the first of them."""
TRAINING_SECONDS, HELD_SECONDS = 0.05, 0.45
"""In turn, so that a quick machine's run is not over before everything is replaced."""
MIGRATE = ("graft.store.main", "migrate")
NEWER = "tests.support.newer_graft"


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="graft-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Installed:
    """A release, and its clients."""

    release: Release
    engine: HeldEngine
    graft: Graft
    openai: openai.OpenAI
    gateway: Pod
    orchestrator: Pod
    data: str = ""

    def job(self, name: str) -> FineTuningJob:
        return self.graft.job(name)

    async def until_job(self, name: str, state: int) -> FineTuningJob:
        ended = (FineTuningJob.STATE_FAILED, FineTuningJob.STATE_SUCCEEDED)

        def reached() -> bool:
            found = self.job(name)
            assert found.state == state or found.state not in ended, found.error
            return bool(found.state == state)

        await until(reached, f"{name} in {FineTuningJob.State.Name(state)}")
        return self.job(name)

    async def create_job(self, suffix: str, steps: int) -> str:
        hyperparameters: dict[str, Any] = {"max_steps": steps, "batch_size": 4}
        made = await asyncio.to_thread(
            self.graft.create_job, BASE, self.data, suffix=suffix, hyperparameters=hyperparameters
        )
        return str(made.name)

    async def replace_gateway(self, *arguments: str) -> None:
        """A rolling update's turn, with a stream and an upload in the hands of the gateway that goes."""
        old, self.engine.go_on = self.gateway, asyncio.Event()
        new = await self.release.gateway(*arguments)
        begun = asyncio.Event()
        loop = asyncio.get_running_loop()

        def ask() -> str:
            pieces = []
            for chunk in self.openai.completions.create(model=BASE, prompt="hello", max_tokens=4, stream=True):
                pieces.append(chunk.choices[0].text)
                loop.call_soon_threadsafe(begun.set)
            return "".join(pieces)

        pipe = self.release.home / f"rows-{os.urandom(4).hex()}.jsonl"
        os.mkfifo(pipe)
        row = b'{"prompt": "a", "completion": "b"}\n'
        streaming = asyncio.create_task(asyncio.to_thread(ask))
        uploading = asyncio.create_task(asyncio.to_thread(self.graft.upload_dataset, pipe))
        writer = await asyncio.to_thread(open, pipe, "wb")
        try:
            await asyncio.to_thread(writer.write, row * 20_000)  # some of the client's chunks, with more to come
            await until(begun.is_set, "the stream has begun")
            await until(lambda: any(self.release.home.glob("datasets/*/*.part")), "the upload has begun")
            self.release.route_to(new)
            ending = asyncio.create_task(old.terminate())
            await old.until_said('"gateway stops"')
            assert not streaming.done()
            assert not uploading.done()
            await asyncio.to_thread(writer.write, row * 10_000)
        finally:
            self.engine.go_on.set()
            await asyncio.to_thread(writer.close)
        assert await streaming == STREAMED
        assert (await uploading).row_count == 30_000
        assert await ending == 0, old.log.read_text()[-3000:]
        self.gateway = new

    async def replace_orchestrator(self, new: Pod) -> None:
        """Both are there, and the old one is told to end."""
        assert await self.orchestrator.terminate() == 0, self.orchestrator.log.read_text()[-3000:]
        self.orchestrator = new
        await new.until_said('"job_adopted"')


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def installed(home: Path, empty_postgres: str) -> AsyncIterator[Installed]:
    base = make_tiny_llama(home / "tiny")
    (home / "base_models.yaml").write_text(json.dumps({BASE: {"folder": str(base)}}))
    with mlflow_server(home / "mlflow") as tracking_uri:
        it = release(home, empty_postgres, tracking_uri, BASE)
        it.start_head()
        engine = HeldEngine(BASE, base, Registry(tracking_uri, home / "engine"))
        async with served(engine, int(it.environment["GRAFT_SERVING_GRPC_PORT"])):
            try:
                await it.run(*MIGRATE)
                gateway = await it.gateway()
                it.route_to(gateway)
                await listening(it.ray_ports[1], home / "head.log", 120)
                connection = Connection(address=f"127.0.0.1:{it.grpc.port}", api_key="", project="default")
                asking = openai.OpenAI(base_url=f"http://127.0.0.1:{it.http.port}/v1", api_key="any", max_retries=0)
                with Graft(connection) as graft, asking:
                    made = Installed(it, engine, graft, asking, gateway, await it.orchestrator())
                    rows = write_rows(home / "rows.jsonl", sums(40))
                    made.data = (await asyncio.to_thread(graft.upload_dataset, rows)).name
                    yield made
            finally:
                it.stack.close()
                it.end_head()


def _stored_progress(it: Installed, job: str) -> dict[str, Any]:
    engine = sync_engine(it.release.environment["GRAFT_STORE_URL"])
    with engine.connect() as connection:
        asked = text("SELECT progress FROM jobs WHERE id = :id")
        found: dict[str, Any] = connection.execute(asked, {"id": job.rsplit("/", 1)[-1]}).scalar_one() or {}
    engine.dispose()
    return found


async def test_an_upgrade_and_a_rollback_in_the_middle_of_a_job_lose_nothing(installed: Installed) -> None:
    it = installed
    job = await it.create_job("sums", STEPS)
    watching = asyncio.create_task(asyncio.to_thread(lambda: list(it.graft.watch_job(job))))
    await it.until_job(job, FineTuningJob.STATE_RUNNING)
    with slowed(it.release.training_workers(), TRAINING_SECONDS, HELD_SECONDS):
        # helm upgrade: the hook, then one pod after the other.
        newer = asyncio.create_task(it.release.orchestrator(NEWER, "orchestrator"))
        await it.release.run(NEWER, "migrate")
        await it.replace_gateway(NEWER, "gateway")
        await it.replace_orchestrator(await newer)
        await until(
            lambda: FIELD in _stored_progress(it, job), "the newer orchestrator writes what this version does not know"
        )

        # helm rollback: no hook, and the same backwards, on a schema that this version does not know.
        older = asyncio.create_task(it.release.orchestrator())
        await it.replace_gateway()
        await it.replace_orchestrator(await older)
        assert it.job(job).state == FineTuningJob.STATE_RUNNING

    done = await it.until_job(job, FineTuningJob.STATE_SUCCEEDED)
    updates = await watching
    assert (done.attempt, done.fine_tuned_model) == (1, f"{BASE}:sums@1")
    assert done.progress.step == STEPS
    assert [update.event.sequence for update in updates] == list(range(1, len(updates) + 1))
    assert updates[-1].fine_tuning_job.state == FineTuningJob.STATE_SUCCEEDED
    reports = [update.event.data["report"] for update in updates if "report" in update.event.data]
    assert reports == sorted(set(reports))


async def test_a_training_cluster_that_is_made_anew_costs_a_job_an_attempt_and_makes_no_second_version(
    installed: Installed,
) -> None:
    it = installed
    job = await it.create_job("anew", STEPS_ANEW)
    await it.until_job(job, FineTuningJob.STATE_RUNNING)
    with held(it.release.training_workers()):  # else it may be over before the cluster is
        await asyncio.to_thread(it.release.end_head)
    it.release.start_head()
    done = await it.until_job(job, FineTuningJob.STATE_SUCCEEDED)
    assert (done.attempt, done.fine_tuned_model) == (2, f"{BASE}:anew@1")
    registry = Registry(it.release.environment["GRAFT_REGISTRY_TRACKING_URI"], it.release.home / "asked")
    published = await asyncio.to_thread(registry.snapshot)
    assert [version.model for version in published.versions if version.adapter == "anew"] == [f"{BASE}:anew@1"]
