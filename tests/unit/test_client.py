"""The SDK through a real gateway."""

import asyncio
from pathlib import Path

import pytest

from graft.api.v1 import fine_tuning_job_pb2
from graft.client import AsyncGraft, Connection, Graft
from graft.domain.errors import InvalidArgument, NotFound, Unavailable
from tests.support import gateways
from tests.support.ports import free_port

State = fine_tuning_job_pb2.FineTuningJob.State


def _address(running: gateways.Gateway) -> str:
    return running.address


async def test_both_clients_upload_create_follow_and_cancel(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(gateways.ROWS)

    def blocking(address: str) -> list[str]:
        with Graft(Connection(address=address)) as graft:
            data = graft.upload_dataset(file)
            assert (data.row_count, data.display_name) == (2, "rows.jsonl")
            job = graft.create_job(
                gateways.BASE, data.name, suffix="films", lora={"rank": 8}, hyperparameters={"epochs": 2.0}
            )
            assert job.state == State.STATE_VALIDATING
            assert graft.job(job.name).hyperparameters.epochs == 2.0
            assert [item.name for item in graft.jobs()] == [job.name]
            assert graft.cancel_job(job.name).cancel_requested
            seen = []
            for update in graft.watch_job(job.name):
                seen.append(update.event.message)
                if len(seen) == 2:
                    break
            return seen

    async with gateways.gateway(tmp_path) as running:
        assert (await asyncio.to_thread(blocking, _address(running)))[0] == "Job created."
        async with AsyncGraft(Connection(address=_address(running))) as graft:
            assert len(await graft.datasets()) == 1
            (job,) = await graft.jobs()
            async for update in graft.watch_job(job.name, after_sequence=1):
                assert update.event.sequence == 2
                break
            assert [event.sequence for event in await graft.job_events(job.name)] == [1, 2]


async def test_an_answer_that_its_reader_leaves_is_stopped_in_the_engine(tmp_path: Path) -> None:
    async with gateways.gateway(tmp_path) as running:
        running.engine.delay_seconds = 0.5

        def blocking(address: str) -> None:
            with Graft(Connection(address=address)) as graft:
                pieces = graft.stream(gateways.BASE, prompt="x")
                next(pieces)
                pieces.close()  # type: ignore[attr-defined]
                # The connection is still open: it was not its end that stopped the answer.
                graft.base_models()

        await asyncio.to_thread(blocking, _address(running))
        await gateways.eventually(lambda: running.engine.abandoned == 1)
        async with AsyncGraft(Connection(address=_address(running))) as graft:
            pieces = graft.stream(gateways.BASE, prompt="x")
            await anext(aiter(pieces))
            await pieces.aclose()  # type: ignore[attr-defined]
            await gateways.eventually(lambda: running.engine.abandoned == 2)


async def test_both_clients_name_and_ask_adapters(tmp_path: Path) -> None:
    async with gateways.gateway(tmp_path) as running, AsyncGraft(Connection(address=_address(running))) as graft:
        assert [base.model for base in await graft.base_models()] == [gateways.BASE]
        (adapter,) = await graft.adapters()
        assert adapter.model == f"{gateways.BASE}:reviews"
        assert [version.version for version in await graft.adapter_versions(adapter.model)] == [3, 1]
        assert (await graft.adapter(adapter.model)).aliases == {"champion": 3}
        assert (await graft.adapter_version(f"{adapter.model}@1")).version == 1
        assert (await graft.adapter_version(adapter.model)).version == 3
        answer = await graft.generate(adapter.model, prompt="hello")
        assert answer.model == f"{gateways.BASE}:reviews@3"
        assert await graft.residency()

        def blocking() -> str:
            with Graft(Connection(address=_address(running))) as blocking_graft:
                pieces = blocking_graft.stream(adapter.model, messages=[{"role": "user", "content": "hello"}])
                return "".join(piece.text for piece in pieces)

        assert await asyncio.to_thread(blocking)


async def test_a_failure_is_the_same_domain_error_that_the_gateway_raised(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": 1}\n')
    async with gateways.gateway(tmp_path) as running, AsyncGraft(Connection(address=_address(running))) as graft:
        with pytest.raises(NotFound, match=f"'nope'.*{gateways.BASE}"):
            await graft.generate("nope", prompt="x")
        sent: list[int] = []
        rows = bad.with_name("many.jsonl")
        rows.write_bytes(gateways.ROWS * 10_000)
        await graft.upload_dataset(rows, progress=sent.append)
        assert sent[-1] == rows.stat().st_size
        assert sent == sorted(set(sent))
        assert len(sent) > 2
        with pytest.raises(InvalidArgument) as caught:
            await graft.upload_dataset(bad)
        assert caught.value.violations[0].field.startswith("line 1")


async def test_wrong_arguments_are_refused_before_anything_is_sent(tmp_path: Path) -> None:
    async with AsyncGraft(Connection(address="127.0.0.1:1")) as graft:
        with pytest.raises(InvalidArgument, match="cannot be read"):
            await graft.upload_dataset(tmp_path / "absent.jsonl")
        with pytest.raises(InvalidArgument, match="prompt or messages"):
            await graft.generate("base")
        with pytest.raises(InvalidArgument, match="hyperparameters"):
            await graft.create_job("base", "ds-1", hyperparameters={"epoch": 1})
        with pytest.raises(InvalidArgument, match="sampling"):
            await graft.generate("base", prompt="x", max_tokens=2**40)
        for messages, told in (
            ([{"role": "user", "text": "x"}], "messages"),
            ([{"role": 1, "content": "x"}], "messages"),
        ):
            with pytest.raises(InvalidArgument, match=told):
                await graft.generate("base", messages=messages)  # type: ignore[arg-type]
        with pytest.raises(InvalidArgument, match="prompt"):
            await graft.generate("base", prompt="half a pair: \ud800")
        with pytest.raises(InvalidArgument, match="fine_tuning_job"):
            await graft.create_job("base", "ds-1", suffix=5)  # type: ignore[typeddict-item]
        with pytest.raises(InvalidArgument, match="contestants"):
            await graft.create_evaluation("ds-1", [("base", 2**40)])
        with pytest.raises(InvalidArgument, match="version"):
            await graft.set_alias("base:reviews", "candidate", 2**40)


async def test_a_file_that_ends_badly_while_it_is_sent_is_told_as_that_and_nothing_is_stored(tmp_path: Path) -> None:
    import fsspec
    from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

    class Broken(MemoryFile):
        def read(self, *size: int) -> bytes:
            if self.tell() >= 300_000:
                raise OSError("the link is down")
            return super().read(*size)  # type: ignore[no-any-return]

    class BrokenFileSystem(MemoryFileSystem):
        protocol = "broken"
        cachable = False

        def _open(self, *_: object, **__: object) -> MemoryFile:
            return Broken(self, "rows", gateways.ROWS * 10_000)

    fsspec.register_implementation("broken", BrokenFileSystem, clobber=True)
    async with gateways.gateway(tmp_path) as running:
        async with AsyncGraft(Connection(address=_address(running))) as graft:
            with pytest.raises(InvalidArgument, match=r"broken://rows cannot be read: the link is down\."):
                await graft.upload_dataset("broken://rows")
            assert await graft.datasets() == []

        def blocking() -> None:
            with Graft(Connection(address=_address(running))) as other:
                other.upload_dataset("broken://rows")

        with pytest.raises(InvalidArgument, match="the link is down"):
            await asyncio.to_thread(blocking)
        await gateways.eventually(lambda: not list(running.settings.home.path.glob("datasets/*/*")))


async def test_no_gateway_is_told_with_the_address_and_the_fix() -> None:
    address = f"127.0.0.1:{free_port()}"
    async with AsyncGraft(Connection(address=address)) as graft:
        with pytest.raises(Unavailable, match=f"{address}.*graft up"):
            await graft.jobs()


def test_a_connection_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFT_ADDRESS", "https://graft.example:443/")
    monkeypatch.setenv("GRAFT_API_KEY", "secret")
    monkeypatch.setenv("GRAFT_PROJECT", "team")
    connection = Connection()
    assert (connection.target, connection.parent) == ("graft.example:443", "projects/team")
    assert connection.metadata == (("authorization", "Bearer secret"),)
    assert connection.credentials is not None
    assert "secret" not in repr(connection)
