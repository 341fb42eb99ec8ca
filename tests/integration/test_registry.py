"""The registry's promises, on a real MLflow server."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from graft.cli.lineage import read_lineage
from graft.domain.errors import FailedPrecondition, NotFound, Unavailable
from graft.domain.jobs import ServedAs, Tuning
from graft.registry.digest import adapter_digest, model_digest
from graft.registry.mlflow_registry import Publication, Registry, code_version
from tests.support.mlflow_server import mlflow_server
from tests.support.ports import free_port
from tests.support.tiny_llama import make_tiny_llama

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as running:
        yield running


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapter")
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).save_pretrained(folder)
    (folder / "graft.json").write_text("{}")
    return folder


def _publication(registry: Registry, folder: Path, job: str, adapter: str = "reviews") -> Publication:
    run = registry.start_run("default", job, 1, {"epochs": "1"}, {"graft.dataset_digest": "sha256:d"})
    return Publication(
        "default", "tiny", adapter, job, 1, run, folder, "sha256:b", "sha256:d", rank=4, metrics={"train_loss": 0.5}
    )


def test_a_version_is_published_once_however_often_its_job_tries(uri: str, adapter: Path, tmp_path: Path) -> None:
    registry = Registry(uri, tmp_path)
    publication = _publication(registry, adapter, "ft-once", "once")
    first = registry.publish(publication)
    assert registry.publish(publication) == first
    assert (first.model, first.digest) == ("tiny:once@1", adapter_digest(adapter))
    assert (first.job_id, first.rank, first.metrics) == ("ft-once", 4, {"train_loss": 0.5})
    assert (first.base_model_digest, first.dataset_digest) == ("sha256:b", "sha256:d")
    assert registry.start_run("default", "ft-once", 1, {}, {}) == publication.run_id
    assert registry.start_run("default", "ft-once", 2, {}, {}) != publication.run_id
    second = registry.publish(_publication(registry, adapter, "ft-again", "once"))
    assert second.model == "tiny:once@2"


def test_a_pulled_version_is_proven_and_cached(uri: str, adapter: Path, tmp_path: Path) -> None:
    registry = Registry(uri, tmp_path)
    version = registry.publish(_publication(registry, adapter, "ft-pull", "pulled"))
    folder = registry.pull("default--tiny--pulled", 1, version.digest)
    assert adapter_digest(folder) == version.digest
    assert (folder / "graft.json").exists()
    assert Registry("http://127.0.0.1:1", tmp_path).pull("default--tiny--pulled", 1, version.digest) == folder
    with pytest.raises(FailedPrecondition, match="have changed"):
        registry.pull("default--tiny--pulled", 1, "sha256:" + "0" * 64)
    with pytest.raises(NotFound, match="version 9"):
        registry.pull("default--tiny--pulled", 9, "sha256:" + "0" * 64)
    assert [path.name for path in (tmp_path / "adapters").iterdir()] == [folder.name]


def test_plain_mlflow_and_peft_download_and_load_a_version(uri: str, adapter: Path, base: Path, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    registry = Registry(uri, tmp_path)
    registry.publish(_publication(registry, adapter, "ft-plain", "plain"))
    # A process that knows nothing of Graft, as a user's would be.
    script = "import sys, mlflow; mlflow.artifacts.download_artifacts(sys.argv[1], dst_path=sys.argv[2])"
    folder = tmp_path / "plain"
    folder.mkdir()
    environment = {**os.environ, "MLFLOW_TRACKING_URI": uri}
    subprocess.run(
        [sys.executable, "-c", script, "models:/default--tiny--plain/1", str(folder)],
        check=True,
        env=environment,
        cwd=tmp_path,
    )
    tokens = torch.tensor([[5, 6, 7]])
    loaded = [
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(where))(tokens).logits
        for where in (folder, adapter)
    ]
    assert torch.equal(*loaded)


def test_a_snapshot_tells_aliases_that_anybody_moved(uri: str, adapter: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    registry = Registry(uri, tmp_path)
    for job in ("ft-a", "ft-b"):
        registry.publish(_publication(registry, adapter, job, "moved"))
    client = MlflowClient(uri, uri)
    client.create_registered_model("somebody-elses")
    registry.set_alias("default", "tiny", "moved", "champion", 1)

    def moved() -> dict[str, int]:
        (found,) = [item for item in registry.snapshot().adapters if item.adapter == "moved"]
        assert found.newest_version == 2
        return found.aliases

    assert moved() == {"champion": 1}
    client.set_registered_model_alias("default--tiny--moved", "champion", "2")
    assert moved() == {"champion": 2}
    with pytest.raises(NotFound, match="tiny:moved@7"):
        registry.set_alias("default", "tiny", "moved", "champion", 7)
    with pytest.raises(NotFound):
        registry.set_alias("default", "tiny", "nope", "champion", 1)


def test_curves_and_the_end_of_a_run_are_recorded(uri: str, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    registry = Registry(uri, tmp_path)
    run = registry.start_run("default", "ft-curve", 1, {f"p{n}": str(n) for n in range(150)}, {})
    for step in (1, 2):
        registry.log_metrics(run, {"loss": 1.0 / step}, step)
    registry.finish_run(run, "FINISHED")
    client = MlflowClient(uri, uri)
    assert [point.value for point in client.get_metric_history(run, "loss")] == [1.0, 0.5]
    found = client.get_run(run)
    assert found.info.status == "FINISHED"
    assert len(found.data.params) == 150


def test_a_server_that_is_away_is_unavailable_with_a_hint(tmp_path: Path) -> None:
    registry = Registry(f"http://127.0.0.1:{free_port()}", tmp_path)
    with pytest.raises(Unavailable, match="MLflow at") as caught:
        registry.snapshot()
    assert caught.value.retry_after_seconds


def test_a_model_beside_an_adapter_is_uploaded_pulled_and_proven(
    uri: str, adapter: Path, base: Path, tmp_path: Path
) -> None:
    registry = Registry(uri, tmp_path)
    asked = _publication(registry, adapter, "ft-delta", "delta")
    asked = replace(
        asked,
        served_as=ServedAs.LOW_RANK_DELTA,
        tuning=Tuning.FULL,
        model_folder=base,
        trained_folder=adapter,
        metrics={"delta_retained_fraction": 0.875},
    )
    version = registry.publish(asked)
    assert (version.served_as, version.digest) == (ServedAs.LOW_RANK_DELTA, adapter_digest(adapter))
    assert adapter_digest(registry.pull("default--tiny--delta", 1, version.digest)) == version.digest
    folder = registry.pull_model("default--tiny--delta", 1, version.digest)
    assert model_digest(folder) == model_digest(base)
    from mlflow import MlflowClient

    client = MlflowClient(uri, uri)
    tags = client.get_model_version("default--tiny--delta", "1").tags
    assert tags["graft.served_as"] == "low_rank_delta"
    assert tags["graft.tuning"] == "full"
    assert tags["graft.delta_retained_fraction"] == "0.875"
    assert {item.path for item in client.list_artifacts(asked.run_id)} == {"adapter", "model", "trained_adapter"}
    with pytest.raises(FailedPrecondition, match="have changed"):
        registry.pull_model("default--tiny--delta", 1, "sha256:" + "0" * 64)


def test_a_model_that_is_served_as_such_has_its_own_digest(uri: str, adapter: Path, base: Path, tmp_path: Path) -> None:
    registry = Registry(uri, tmp_path)
    plain = registry.publish(_publication(registry, adapter, "ft-adapter", "either"))
    asked = replace(
        _publication(registry, adapter, "ft-merged", "either"),
        folder=None,
        model_folder=base,
        served_as=ServedAs.MERGED_MODEL,
        rank=0,
    )
    version = registry.publish(asked)
    assert registry.publish(asked) == version
    weights = (base / "model.safetensors").stat().st_size
    assert (version.digest, version.rank, version.size_bytes) == (model_digest(base), 0, weights)
    assert version.served_as is ServedAs.MERGED_MODEL
    (told,) = [item for item in registry.snapshot().versions if item.job_id == "ft-merged"]
    assert told == version
    assert plain.served_as is ServedAs.ADAPTER
    folder = registry.pull_model("default--tiny--either", 2, version.digest)
    assert Registry("http://127.0.0.1:1", tmp_path).pull_model("default--tiny--either", 2, version.digest) == folder
    with pytest.raises(FailedPrecondition, match="without a model of its own"):
        registry.pull_model("default--tiny--either", 1, plain.digest)


async def test_anybody_can_read_a_versions_lineage_over_mlflows_rest_api(
    uri: str, adapter: Path, tmp_path: Path
) -> None:
    registry = Registry(uri, tmp_path)
    publication = _publication(registry, adapter, "ft-lineage", "lineage")
    for step in (1, 2):
        registry.log_metrics(publication.run_id, {"loss": 2.0 / step}, step)
    version = registry.publish(publication)

    lineage = await read_lineage(uri, "default--tiny--lineage", version.version)
    assert (lineage.run_id, lineage.params, lineage.losses) == (
        publication.run_id,
        {"epochs": "1"},
        ((1, 2.0), (2, 1.0)),
    )
    assert not lineage.finished
    lineage.check({"graft.job": "ft-lineage", "graft.dataset_digest": "sha256:d", "graft.digest": version.digest})
    with pytest.raises(FailedPrecondition, match=r"graft\.job is 'ft-lineage', not 'ft-other'"):
        lineage.check({"graft.job": "ft-other"})

    registry.finish_run(publication.run_id, "FINISHED")
    assert (await read_lineage(uri, "default--tiny--lineage", version.version)).finished
    with pytest.raises(Unavailable, match="default--tiny--lineage version 9"):
        await read_lineage(uri, "default--tiny--lineage", 9)


def test_lineage_names_the_commit_that_trained() -> None:
    here = Path(__file__).parent
    asked = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if asked.returncode:
        pytest.skip("these sources are not in a git checkout")
    assert re.fullmatch(rf"graft [\d.]+ \({asked.stdout[:12]}(-dirty)?\)", code_version())
