"""A run on a host that shares no disk with others: it fetches what it needs and puts what it leaves."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from graft.domain.errors import Unavailable
from graft.domain.jobs import EventLevel, Lora, ServedAs, Tuning
from graft.storage import Storage, base_model_uri, share_base_model
from graft.training import places, search
from graft.training.objectives.objective import ALONE
from graft.training.search import trial_spec
from graft.training.spec import Clock, RunSpec
from graft.training.sweep import SearchSpec, Trial
from graft.training.worker import run_worker
from tests.support.run_specs import tiny_run
from tests.support.tiny_llama import make_tiny_llama

Told = list[tuple[str, dict[str, Any]]]


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunSpec:
    """A run whose base model and data are in the storage alone."""
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "shared").mkdir()
    storage = Storage(f"file://{tmp_path}/shared")
    base = make_tiny_llama(tmp_path / "elsewhere")
    share_base_model(storage, str(base), "sha256:b")
    shutil.rmtree(base)
    uri = storage.uri("datasets", "default", "ds-1.jsonl")
    rows = [{"prompt": f"{n} is ", "completion": "even" if n % 2 == 0 else "odd"} for n in range(16)]
    storage.write(uri, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return tiny_run(
        base,
        uri,
        "/nowhere/on/this/host",
        total_steps=4,
        batch_size=4,
        checkpoint_steps=2,
        lora=Lora(4, 8.0, 0.0, ("q_proj", "v_proj")),
        storage=storage,
        output_key="runs/ft-1/1",
    )


def _run(spec: RunSpec) -> Told:
    told: Told = []
    run_worker(spec, lambda kind, data: told.append((kind, data)), ALONE, lambda: 1, Clock())
    return told


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_run_fetches_base_and_data_and_puts_checkpoints_and_result(spec: RunSpec, tmp_path: Path) -> None:
    told = _run(spec)
    assert told[-1][0] == "finished"
    uri = f"file://{tmp_path}/shared/runs/ft-1/1/checkpoints/step-2"
    assert [data["uri"] for kind, data in told if kind == "checkpoint"] == [uri]
    assert spec.storage is not None
    assert "adapter_model.safetensors" in spec.storage.names(uri)
    adapter = spec.storage.fetch_folder(spec.storage.uri(spec.output_key, "adapter"), tmp_path / "orchestrator")
    assert _files(adapter) == ["adapter_config.json", "adapter_model.safetensors", "graft.json"]
    assert _files(tmp_path / "cache" / "runs") == []


def test_a_storage_that_is_away_at_a_checkpoint_loses_that_checkpoint_and_not_the_run(
    spec: RunSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = Storage.put_folder

    def away(self: Storage, folder: Path, uri: str) -> None:
        if "checkpoints" in uri:
            raise Unavailable("The storage is away.", reason="STORAGE_UNAVAILABLE")
        put(self, folder, uri)

    monkeypatch.setattr(Storage, "put_folder", away)
    told = _run(spec)
    assert told[-1][0] == "finished"
    assert [kind for kind, _ in told if kind == "checkpoint"] == []
    (lost,) = [data for kind, data in told if kind == "message"]
    assert "step 2 is not kept" in lost["message"]
    assert lost["level"] in set(EventLevel), "the orchestrator tells what it does not know as all is well"


def test_an_old_checkpoint_that_cannot_be_removed_costs_no_new_one_and_goes_later(
    spec: RunSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Storage, "delete", _away_once(Storage.delete, "delete", ["delete"]))
    full = {"tuning": Tuning.FULL, "lora": Lora(), "served_as": ServedAs.MERGED_MODEL}
    told = _run(replace(spec, total_steps=5, checkpoint_steps=1, **full))  # type: ignore[arg-type]
    uris = [str(data["uri"]) for kind, data in told if kind == "checkpoint"]
    assert [uri.rpartition("-")[2] for uri in uris] == ["1", "2", "3", "4"]
    assert spec.storage is not None
    assert [spec.storage.has_folder(uri) for uri in uris] == [False, False, True, True]


class _Told:
    """In the place of an actor's method by its handle."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def options(self, **_: object) -> "_Told":
        return self

    def remote(self, *given: Any) -> None:
        self.told.append(given)


def test_a_storage_that_is_away_for_a_moment_ends_no_trial(spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    away = ["put_folder", "delete"]
    for name in tuple(away):
        monkeypatch.setattr(Storage, name, _away_once(getattr(Storage, name), name, away))
    monkeypatch.setattr(places, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(search.ray, "get", lambda sent: sent)
    monkeypatch.setattr("ray.tune.report", lambda _: None)
    monkeypatch.setattr(search, "free_threads", lambda _: 1)
    trials = SearchSpec((Trial(1, 1e-2, 4, 8.0),), 1, 3.0, 1)
    held_out = {"validation_path": spec.dataset_path, "validation_format": spec.dataset_format, "eval_steps": 1}
    actor: Any = SimpleNamespace(report=_Told(), place=_Told())
    search._trial({"trial": 1}, replace(spec, search=trials, **held_out), actor, time.time())  # type: ignore[arg-type]
    kinds = [kind for _, kind, *_ in actor.report.told]
    assert kinds[-1] == "finished"
    assert kinds.count("saved") > 1
    assert away == []


def test_a_storage_that_comes_back_is_waited_for_and_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    answers: list[Callable[[], int]] = [_away, _away, lambda: 7]
    told: Told = []
    assert places.patiently(lambda: answers.pop(0)(), lambda kind, data: told.append((kind, data))) == 7
    assert [data["level"] for _, data in told] == [EventLevel.WARN]


def test_a_storage_that_stays_away_ends_the_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(Unavailable):
        places.patiently(_away, lambda *_: None)


def _away() -> int:
    raise Unavailable("The storage is away.", reason="STORAGE_UNAVAILABLE")


def _away_once(method: Callable[..., Any], name: str, away: list[str]) -> Callable[..., Any]:
    def call(*given: Any) -> Any:
        if name in away:
            away.remove(name)
            _away()
        return method(*given)

    return call


def test_the_best_trial_of_another_host_becomes_the_result_as_soon_as_the_storage_is_there(
    spec: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = places.on_this_host(trial_spec(spec, Trial(3, 1e-3, 4, 8.0)))
    folder = Path(trial.output_dir) / "step-2"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    where = places.put(trial, folder)
    assert where == f"file://{tmp_path}/shared/runs/ft-1/1/trials/3/step-2"
    monkeypatch.setattr(places, "RETRY_SECONDS", 0.0)
    away = ["fetch_folder", "put_folder"]
    for name in tuple(away):
        monkeypatch.setattr(Storage, name, _away_once(getattr(Storage, name), name, away))
    told: Told = []
    search._keep(places.on_this_host(spec), where, lambda kind, data: told.append((kind, data)))
    assert [data["level"] for _, data in told] == [EventLevel.WARN, EventLevel.WARN]
    assert spec.storage is not None
    assert spec.storage.has_folder(spec.storage.uri(spec.output_key, "adapter"))


def test_without_a_shared_storage_everything_stays_where_it_is(spec: RunSpec, tmp_path: Path) -> None:
    alone = replace(spec, storage=None, output_dir=str(tmp_path / "run"))
    assert places.with_files(alone) is alone
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    assert places.put(alone, tmp_path / "run" / "adapter") == str(tmp_path / "run" / "adapter")
    assert (tmp_path / "run" / "adapter").is_dir()
    assert places.ray_storage(alone) == {"storage_path": str(tmp_path / "run")}


def test_a_base_model_that_two_put_at_once_stays_whole_once_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shared").mkdir()
    storage = Storage(f"file://{tmp_path}/shared")
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    look = Storage.has_folder

    def look_early(self: Storage, uri: str) -> bool:
        found = look(self, uri)
        monkeypatch.setattr(Storage, "has_folder", look)
        share_base_model(storage, str(base), "sha256:b")  # another process, which is through before this one begins
        monkeypatch.setattr("fsspec.implementations.local.LocalFileSystem.put_file", cut)
        return found

    def cut(*_: object, **__: object) -> None:
        raise ConnectionError("The link is cut.")

    monkeypatch.setattr(Storage, "has_folder", look_early)
    with pytest.raises(Unavailable):
        share_base_model(storage, str(base), "sha256:b")
    assert storage.has_folder(base_model_uri(storage, "sha256:b"))
