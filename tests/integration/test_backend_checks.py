"""`graft doctor` of a real PostgreSQL and a real S3 server, as they should be and with one thing wrong."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs
from sqlalchemy import create_engine, make_url, text

from graft.settings import Settings, load
from graft.stack.backends import check_storage, check_store
from graft.stack.machine import State
from graft.store.main import main
from graft.store.sql import migrate
from tests.support.s3_server import S3Server, s3_server

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def bucket(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    for name, value in s3.variables.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    return {"GRAFT_STORAGE_URL": "s3://graft/prefix", "GRAFT_STORAGE_ENDPOINT_URL": s3.endpoint_url}


def _settings(tmp_path: Path, **variables: str) -> Settings:
    return load({"GRAFT_HOME": str(tmp_path), **variables})


def test_a_bucket_that_works_is_left_as_it_was(tmp_path: Path, s3: S3Server, bucket: dict[str, str]) -> None:
    check = check_storage(_settings(tmp_path, **bucket))
    assert check.state is State.OK, check
    assert not [path for path in s3.folder.rglob("*") if path.is_file()]


def test_a_wrong_secret_a_missing_bucket_and_a_wrong_port_are_told_apart(
    tmp_path: Path, bucket: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = check_storage(_settings(tmp_path, **bucket | {"GRAFT_STORAGE_URL": "s3://nowhere/prefix"}))
    assert missing.state is State.FAIL
    assert "does not exist" in missing.message
    away = check_storage(_settings(tmp_path, **bucket | {"GRAFT_STORAGE_ENDPOINT_URL": "http://127.0.0.1:1"}))
    assert away.state is State.FAIL
    assert "127.0.0.1:1" in away.message
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    s3fs.S3FileSystem.clear_instance_cache()
    wrong = check_storage(_settings(tmp_path, **bucket))
    assert wrong.state is State.FAIL
    assert "AWS_SECRET_ACCESS_KEY" in wrong.message


def test_a_database_says_which_schema_it_has_and_a_wrong_password_is_told(
    tmp_path: Path, postgres: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = create_engine(postgres, isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(text("CREATE DATABASE doctor"))
    server.dispose()
    url = make_url(postgres).set(database="doctor").render_as_string(hide_password=False)
    settings = _settings(tmp_path, GRAFT_STORE_URL=url)
    assert "no schema yet" in check_store(settings).message
    migrate(url, "0003")
    assert "schema 0003" in check_store(settings).message
    monkeypatch.setenv("GRAFT_STORE_URL", url)
    monkeypatch.setenv("GRAFT_HOME", str(tmp_path))
    assert main(["migrate"]) == 0
    assert "from revision 0003 to" in capsys.readouterr().out
    assert main(["migrate"]) == 0
    assert "was at revision" in capsys.readouterr().out
    assert check_store(settings).state is State.OK
    missing = check_store(_settings(tmp_path, GRAFT_STORE_URL=url.replace("/doctor", "/nobody")))
    assert missing.state is State.FAIL
    assert '"nobody" does not exist' in missing.message
    unknown = check_store(_settings(tmp_path, GRAFT_STORE_URL=url.replace("//graft@", "//stranger:secret@")))
    assert unknown.state is State.FAIL
    assert "stranger" in unknown.message
    assert "secret" not in unknown.message
