import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "setup" / "fetch.py"


@pytest.fixture
def fetch(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    # No test reaches an index.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    spec = importlib.util.spec_from_file_location("graft_setup_fetch", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _lock(folder: Path, content: bytes) -> Path:
    path = folder / "lock.txt"
    path.write_text(f"thing==1.0 --hash=sha256:{hashlib.sha256(content).hexdigest()}\n")
    return path


def test_what_is_there_is_not_fetched_again(
    fetch: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "thing-1.0.tar.gz").write_bytes(b"content")
    fetch.fetch_reviews(_lock(tmp_path, b"content"), tmp_path)
    fetch.fetch_base_model(fetch.LOCKS / "base-model.txt")
    monkeypatch.setattr(fetch, "SHARE", Path(sys.prefix) / "share" / "graft")
    assert fetch.main() == 0
    assert capsys.readouterr() == ("", "")


def test_what_cannot_be_fetched_is_one_sentence_with_the_fix_and_leaves_nothing(
    fetch: ModuleType, tmp_path: Path
) -> None:
    share = tmp_path / "share"
    with pytest.raises(RuntimeError, match=r"^thing==1.0, .*No matching distribution.*make setup"):
        fetch.fetch_reviews(_lock(tmp_path, b"content"), share)
    assert list(share.iterdir()) == []


def test_a_file_that_has_changed_is_not_taken_for_the_locked_one(fetch: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "thing-1.0.tar.gz").write_bytes(b"other")
    with pytest.raises(RuntimeError, match="cannot be fetched"):
        fetch.fetch_reviews(_lock(tmp_path, b"content"), tmp_path)


def test_a_lock_without_a_hash_is_refused(fetch: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "lock.txt"
    path.write_text("thing==1.0\n")
    with pytest.raises(RuntimeError, match="does not hold one line"):
        fetch.pinned(path)
