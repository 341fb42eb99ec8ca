"""A process in an image, as a container runtime starts it: run as root with one argument, the container as JSON.

    {"image": ROOT, "mounts": [[SOURCE, TARGET, READ_ONLY]], "environment": {}, "user": 1, "group": 1, "groups": [],
     "command": [], "folder": "/", "scratch": FOLDER}

Owns namespaces of processes and mounts, the root (the image under a thin layer, read-only), /proc, /sys, /dev, and what
is taken away before the command starts: user, groups, capabilities and the right to gain any. Knows nothing of pods;
the network is that of whoever starts it. Sets no seccomp filter and no limit of memory. The standard library alone.
"""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 24, 38
LAST_CAPABILITY = 40
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value})")


def prepare_root(asked: dict[str, Any]) -> Path:
    """The container's root, with everything mounted that it is to see."""
    layers = Path(asked["scratch"])
    _mount("--make-rprivate", "/")
    _mount("-t", "tmpfs", "none", str(layers))
    upper, work, root = (layers / name for name in ("upper", "work", "root"))
    for folder in (upper, work, root):
        folder.mkdir()
    _mount("-t", "overlay", "-o", f"lowerdir={asked['image']},upperdir={upper},workdir={work}", "none", str(root))
    for name in ("proc", "sys", "dev"):
        (root / name).mkdir(exist_ok=True)
    _mount("-t", "proc", "proc", str(root / "proc"))
    _mount("-t", "sysfs", "-o", "ro", "sysfs", str(root / "sys"))
    _mount("-t", "tmpfs", "-o", "mode=755", "none", str(root / "dev"))
    for name in DEVICES:
        (root / "dev" / name).touch()
        _mount("--bind", f"/dev/{name}", str(root / "dev" / name))
    os.symlink("/proc/self/fd", root / "dev" / "fd")
    (root / "dev" / "shm").mkdir()
    # Outer ones first: a volume may lie in another.
    for source, target, read_only in sorted(asked["mounts"], key=lambda mount: len(mount[1])):
        place = root / target.lstrip("/")
        if Path(source).is_dir():
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()
        _mount("--bind", source, str(place))
        if read_only:
            _mount("-o", "remount,ro,bind", str(place))
    _mount("-o", "remount,ro", str(root))
    return root


def main() -> None:
    """Becomes the container's command."""
    asked = json.loads(sys.argv[1])
    root = prepare_root(asked)
    os.chroot(root)
    os.chdir(asked["folder"])
    for capability in range(LAST_CAPABILITY + 1):
        _prctl(PR_CAPBSET_DROP, capability)
    os.setgroups(asked["groups"])
    os.setresgid(*[asked["group"]] * 3)
    os.setresuid(*[asked["user"]] * 3)
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    os.execvpe(asked["command"][0], asked["command"], asked["environment"])


if __name__ == "__main__":
    main()
