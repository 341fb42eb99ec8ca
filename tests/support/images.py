"""Images built by buildah from bases made here, and their processes run as a cluster would: nothing to write to but a
volume, a user without a name, a network of their own. Needs root."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("buildah", "mmdebstrap", "unshare", "nsenter", "chroot")

_ENTER = """
ip link set lo up 2>/dev/null || true
mount --make-rprivate /
mount --bind "$1" "$1"
mkdir -p "$1/proc" "$1/dev" "$1/tmp"
mount -t proc proc "$1/proc"
mount --rbind /dev "$1/dev"
mount -t tmpfs -o mode=1777 tmpfs "$1/tmp"
mount -t tmpfs -o uid=65532,gid=65532,mode=0700 tmpfs "$1/var/lib/graft"
mount -o remount,ro,bind "$1"
shift
exec "$@"
"""
"""In namespaces of its own: the image read-only, a volume at GRAFT_HOME and another at /tmp."""


def missing() -> str:
    """Why images cannot be built here; empty when they can."""
    if os.geteuid() != 0:
        return "images are built by root only"
    absent = [tool for tool in NEEDED if shutil.which(tool) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


def run(*command: str, env: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@dataclass(frozen=True)
class Image:
    """A built image, mounted."""

    name: str
    size_bytes: int
    config: dict[str, Any]
    """As Docker has it: Env, User, Cmd, Healthcheck."""
    root: Path

    def command(self, arguments: Sequence[str], **variables: str) -> list[str]:
        """What runs `arguments` inside, with the image's user and environment."""
        user, group = self.config["User"].split(":")
        settings = [*self.config["Env"], *(f"{name}={value}" for name, value in variables.items())]
        inside = ["/usr/sbin/chroot", f"--userspec={user}:{group}", "--groups=", str(self.root)]
        return ["/usr/bin/env", "-i", *settings, *inside, *arguments]

    @contextmanager
    def running(self, log: Path, **variables: str) -> Iterator["Running"]:
        """The image's own command, until the block ends."""
        unshared = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "sh", "-ec", _ENTER, "enter"]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*unshared, str(self.root), *self.command(self.config["Cmd"], **variables)],
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        running = Running(self, process, log)
        try:
            while process.poll() is None and not running.started():
                time.sleep(0.05)
            assert process.poll() is None, log.read_text()
            yield running
        finally:
            process.kill()
            process.wait()


@dataclass(frozen=True)
class Running:
    """A process of an image."""

    image: Image
    process: "subprocess.Popen[bytes]"
    log: Path

    @property
    def inside(self) -> psutil.Process:
        (child,) = psutil.Process(self.process.pid).children()
        return child

    def started(self) -> bool:
        """Past what prepares its namespaces: its root is the image's."""
        children = psutil.Process(self.process.pid).children()
        with suppress(FileNotFoundError):  # it has ended, which its log tells
            return bool(children) and os.readlink(f"/proc/{children[0].pid}/root") == str(self.image.root)
        return False

    def execute(self, arguments: Sequence[str], **variables: str) -> "subprocess.CompletedProcess[str]":
        """Runs another command beside it, as `kubectl exec` would."""
        entered = ["nsenter", f"--target={self.inside.pid}", "--mount", "--net", "--pid"]
        return subprocess.run(
            [*entered, *self.image.command(arguments, **variables)], capture_output=True, text=True, timeout=60
        )


def environment(folder: Path) -> dict[str, str]:
    """buildah's, with its storage below `folder`, not the machine's."""
    storage = folder / "storage.conf"
    storage.write_text(f'[storage]\ndriver = "vfs"\ngraphroot = "{folder / "storage"}"\nrunroot = "{folder / "run"}"\n')
    kept = {name: value for name, value in os.environ.items() if name != "STORAGE_DRIVER"}
    return kept | {"CONTAINERS_STORAGE_CONF": str(storage), "BUILDAH_ISOLATION": "chroot"}


def packages(folder: Path) -> list[str]:
    """Of `buildah build`: packages come from where this machine's pip has them from, torch's CPU build too."""
    told = run(sys.executable, "-m", "pip", "config", "list", env=dict(os.environ))
    names = ("index-url", "extra-index-url", "find-links", "cert")
    # `:env:.cert='/etc/…'` and `global.cert='/etc/…'`, the stronger first.
    found = {
        name: value.strip("'")
        for key, _, value in (line.partition("=") for line in reversed(told.splitlines()))
        if (name := key.rpartition(".")[2]) in names
    }
    configuration = folder / "pip.conf"
    configuration.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in found.items()))
    local = {Path(word.removeprefix("file://")) for value in found.values() for word in value.split()}
    # An index in a folder, `…/simple`, links to files beside it.
    shown = {path.parent if path.name == "simple" else path for path in local if path.is_absolute()}
    volumes = [f"--volume={path}:{path}:ro" for path in sorted(shown) if path.exists()]
    # Where an index is configured, pytorch.org is not asked: it may be out of reach, and pip tries it for each package.
    indexes = [found[name].split()[0] for name in ("index-url", "extra-index-url") if name in found]
    torch = [f"--build-arg=TORCH_INDEX={index}" for index in indexes[:1]]
    return [f"--secret=id=pip,src={configuration}", *volumes, *torch]


BASES = {
    "gateway": ("BUILD_IMAGE=localhost/graft-build", "BASE_IMAGE=localhost/graft-base"),
    "ray": ("BASE_IMAGE=localhost/graft-build",),
}


def build(name: str, folder: Path, env: dict[str, str]) -> Image:
    """Builds deploy/images/NAME.Dockerfile from the locally made bases, and mounts it."""
    bases = [f"--build-arg={base}" for base in BASES[name]]
    file = ROOT / "deploy" / "images" / f"{name}.Dockerfile"
    tag = f"localhost/graft-{name}"
    command = ["buildah", "build", "--format=docker", "--quiet", f"--file={file}", f"--tag={tag}"]
    run(*command, *bases, *packages(folder), str(ROOT), env=env)
    return mounted(name, folder, env)


def known(tag: str, env: dict[str, str]) -> bool:
    """Whether it was built already."""
    return subprocess.run(["buildah", "inspect", "--type=image", tag], env=env, capture_output=True).returncode == 0


def mounted(name: str, folder: Path, env: dict[str, str]) -> Image:  # noqa: ARG001 - as `build` is called
    """The image, which is built."""
    tag = f"localhost/graft-{name}"
    (listed,) = json.loads(run("buildah", "images", "--json", tag, env=env))
    inspected = json.loads(run("buildah", "inspect", "--type=image", tag, env=env))
    container = f"graft-{name}-mounted"
    if subprocess.run(["buildah", "inspect", container], env=env, capture_output=True).returncode != 0:
        run("buildah", "from", "--name", container, tag, env=env)
    root = Path(run("buildah", "mount", container, env=env).strip())
    size = sum(file.lstat().st_size for file in root.rglob("*") if not file.is_dir())
    return Image(listed["names"][0], size, inspected["Docker"]["config"], root)
