"""Files that several hosts read, in a bucket of a real S3 server and below a URL of files."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import s3fs

from graft.domain.errors import FailedPrecondition, NotFound, Unavailable
from graft.storage import MANIFEST, Storage
from tests.support.ports import free_port
from tests.support.s3_server import S3Server, s3_server

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def bucket(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Storage:
    for name, value in s3.variables.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # one that was made with other credentials
    return Storage("s3://graft/one", s3.endpoint_url)


@pytest.fixture(params=["s3", "file"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "s3":
        found: Storage = request.getfixturevalue("bucket")
        return replace(found, root=f"s3://graft/{tmp_path.name}")
    (tmp_path / "shared").mkdir()
    return Storage(f"file://{tmp_path}/shared")


def test_a_file_is_put_fetched_once_and_deleted(storage: Storage, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"x" * 12_000_000)  # more than one part of a multipart upload
    uri = storage.uri("datasets", "default", "ds-1.jsonl")
    storage.put_file(file, uri)
    first = storage.fetch(uri, tmp_path / "cache")
    assert first.read_bytes() == file.read_bytes()
    assert first.suffix == ".jsonl"
    storage.delete(uri)
    storage.delete(uri)
    assert storage.fetch(uri, tmp_path / "cache") == first
    with pytest.raises(NotFound, match="ds-1"):
        storage.fetch(uri, tmp_path / "another host's")


def test_a_folder_is_there_whole_or_not_at_all(storage: Storage, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    (folder / "inner").mkdir(parents=True)
    (folder / "a.safetensors").write_bytes(b"a" * 1000)
    (folder / "inner" / "b.json").write_text("{}")
    uri = storage.uri("runs", "ft-1", "adapter")
    assert not storage.has_folder(uri)
    storage.put_folder(folder, uri)
    assert storage.has_folder(uri)
    assert storage.names(uri) == [MANIFEST, "a.safetensors", "inner/b.json"]
    copy = storage.fetch_folder(uri, tmp_path / "copy")
    assert (copy / "inner" / "b.json").read_text() == "{}"
    assert (copy / "a.safetensors").stat().st_size == 1000
    (folder / "a.safetensors").write_bytes(b"b" * 1000)
    storage.put_folder(folder, uri)
    assert (storage.fetch_folder(uri, tmp_path / "again") / "a.safetensors").read_bytes() == b"b" * 1000
    storage.delete(storage.uri("runs", "ft-1", "adapter", "a.safetensors"))
    with pytest.raises(NotFound, match="safetensors"):
        storage.fetch_folder(uri, tmp_path / "half")
    assert not (tmp_path / "half").exists()


def test_a_small_file_is_written_and_read(storage: Storage) -> None:
    uri = storage.uri("evaluations", "default", "ev-1", "report.html")
    with pytest.raises(NotFound):
        storage.read(uri)
    storage.write(uri, b"<html>")
    assert storage.read(uri) == b"<html>"
    assert storage.names(storage.uri("evaluations", "nobody")) == []


def test_a_wrong_key_says_which_variables_to_look_at(bucket: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(FailedPrecondition, match="AWS_SECRET_ACCESS_KEY") as caught:
        bucket.write(bucket.uri("x"), b"1")
    assert caught.value.reason == "STORAGE_REFUSED"


def test_no_key_at_all_says_so(bucket: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(FailedPrecondition, match="AWS_ACCESS_KEY_ID") as caught:
        bucket.write(bucket.uri("x"), b"1")
    assert caught.value.reason == "STORAGE_REFUSED"


def test_a_missing_bucket_is_named(bucket: Storage) -> None:
    elsewhere = replace(bucket, root="s3://nowhere/prefix")
    with pytest.raises(FailedPrecondition, match="s3://nowhere/prefix/x") as caught:
        elsewhere.write(elsewhere.uri("x"), b"1")
    assert caught.value.reason == "STORAGE_BUCKET_MISSING"


def test_a_server_that_is_away_is_unavailable(bucket: Storage) -> None:
    away = replace(bucket, endpoint_url=f"http://127.0.0.1:{free_port()}")
    with pytest.raises(Unavailable, match="does not answer") as caught:
        away.read(away.uri("x"))
    assert caught.value.reason == "STORAGE_UNAVAILABLE"
