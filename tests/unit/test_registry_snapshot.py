"""A snapshot of the registry, of MLflow's answers without a server."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from mlflow.store.entities import PagedList

from graft.domain.errors import Unavailable
from graft.domain.resources import AdapterVersion
from graft.registry import mlflow_registry
from graft.registry.mlflow_registry import Registry

MOST = 100
"""A server may give fewer than were asked for."""


class FakeClient:
    """So many registered models of Graft's, each with two versions, told in pages; and one of somebody else."""

    def __init__(self, count: int) -> None:
        self._models = [
            SimpleNamespace(name=f"default--tiny--a{number}", aliases={"champion": "2"}, creation_timestamp=1000)
            for number in range(count)
        ]
        self._models.append(SimpleNamespace(name="theirs", aliases={}, creation_timestamp=1000))
        self._versions = [
            SimpleNamespace(
                name=model.name,
                version=str(version),
                run_id="run",
                creation_timestamp=1000,
                tags={
                    "graft.digest": f"sha256:{version}",
                    "graft.base_model_digest": "sha256:b",
                    "graft.dataset_digest": "sha256:d",
                    "graft.job": "ft-1",
                    "graft.rank": "8",
                    "graft.size_bytes": "1",
                    "graft.metrics": "{}",
                },
            )
            for model, version in itertools.product(self._models, (1, 2))
        ]

    def search_registered_models(self, max_results: int, page_token: str | None) -> Any:
        return self._page(self._models, max_results, page_token)

    def search_model_versions(self, _query: str, max_results: int, page_token: str | None) -> Any:
        return self._page(self._versions, max_results, page_token)

    @staticmethod
    def _page(items: list[Any], most: int, token: str | None) -> Any:
        start = int(token or 0)
        end = start + min(most, MOST)
        return PagedList(items[start:end], str(end) if end < len(items) else None)


def registry_of(count: int, folder: Path) -> Registry:
    registry = Registry("http://127.0.0.1:1", folder)
    registry._client = FakeClient(count)  # type: ignore[assignment]
    return registry


def test_a_snapshot_holds_every_adapter_of_every_page_and_nobody_elses(tmp_path: Path) -> None:
    snapshot = registry_of(250, tmp_path).snapshot()
    assert [adapter.adapter for adapter in snapshot.adapters] == [f"a{number}" for number in range(250)]
    assert {(adapter.newest_version, adapter.aliases["champion"]) for adapter in snapshot.adapters} == {(2, 2)}
    assert len(snapshot.versions) == 500


def test_a_version_that_has_lost_a_tag_is_left_out_and_hides_no_other(tmp_path: Path) -> None:
    registry = registry_of(2, tmp_path)
    client: Any = registry._client
    del client._versions[0].tags["graft.rank"]  # on MLflow's page
    found = registry.snapshot()
    assert [(version.adapter, version.version) for version in found.versions] == [("a0", 2), ("a1", 1), ("a1", 2)]


def test_a_snapshot_does_not_look_at_every_version_for_every_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0

    class Counted(AdapterVersion):
        def __getattribute__(self, name: str) -> Any:
            nonlocal looks
            looks += name == "adapter"
            return super().__getattribute__(name)

    made = mlflow_registry._version
    monkeypatch.setattr(mlflow_registry, "_version", lambda entry: Counted(**vars(made(entry))))
    registry_of(200, tmp_path).snapshot()
    assert looks < 3 * 400


class _Interrupted(FakeClient):
    """Runs whose parameters are not taken the first time."""

    def __init__(self) -> None:
        super().__init__(0)
        self.runs: list[Any] = []
        self.away = True

    def get_experiment_by_name(self, _name: str) -> Any:
        return SimpleNamespace(experiment_id="0")

    def search_runs(self, *_: object, **__: object) -> list[Any]:
        return self.runs

    def create_run(self, *_: object) -> Any:
        self.runs.append(SimpleNamespace(info=SimpleNamespace(run_id="run"), data=SimpleNamespace(params={})))
        return self.runs[-1]

    def log_batch(self, _run_id: str, params: list[Any]) -> None:
        if self.away:
            self.away = False
            raise MlflowException("It is restarting.")
        self.runs[0].data.params |= {param.key: param.value for param in params}


def test_a_run_that_was_made_without_its_parameters_gets_them_when_it_is_found(tmp_path: Path) -> None:
    registry = Registry("http://127.0.0.1:1", tmp_path)
    client = _Interrupted()
    registry._client = client  # type: ignore[assignment]
    with pytest.raises(Unavailable):
        registry.start_run("default", "ft-1", 1, {"epochs": "1"}, {})
    for _ in range(2):
        assert registry.start_run("default", "ft-1", 1, {"epochs": "1"}, {}) == "run"
    assert len(client.runs) == 1
    assert client.runs[0].data.params == {"epochs": "1"}
