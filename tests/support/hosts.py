"""Hosts for tests: network namespaces on one bridge, each with an address, a name and a disk of its own. Takes root.

Owns the namespaces and what runs in them; all of it is gone afterwards. Nothing leads out: no host has a route beyond
the bridge. At `here` every host sees its own folder and nobody else's, so that one configuration fits all of them and
no file is shared by accident. Does not know what the hosts run.

    with network("store", "head") as hosts:
        hosts["store"].popen([...], log="server.log")
        port = hosts["head"].tunnel(hosts["store"], 5000)   # from this process, by the network of `head`
        hosts["head"].cut()                                 # as a pulled cable: nobody is told
        hosts["head"].heal()
"""

import glob
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

SUBNET = "10.77.0"
NOBODY_MAC = "02:00:00:00:00:01"
"""An address that no host on the bridge has: what is sent there is dropped by all."""
RELAY = """
import asyncio, socket, sys
async def pump(reader, writer):
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()
async def serve(reader, writer):
    try:
        far_reader, far_writer = await asyncio.open_connection(sys.argv[2], int(sys.argv[3]))
    except OSError:
        writer.close()
        return
    await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))
async def main():
    await (await asyncio.start_server(serve, sock=socket.socket(fileno=int(sys.argv[1])))).serve_forever()
asyncio.run(main())
"""
"""Accepts where the socket it inherits listens, and connects from where it runs."""

LISTENING = """
import socket, sys, time
deadline = time.monotonic() + float(sys.argv[3])
while True:
    try:
        socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=1)
        break
    except OSError:
        if time.monotonic() > deadline:
            sys.exit(f"Nothing listens on {sys.argv[1]}:{sys.argv[2]}")
        time.sleep(0.1)
"""


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@dataclass
class Host:
    """One of them. Its processes are those in its namespace, whoever started them."""

    name: str
    address: str
    root: Path
    """Of all hosts."""
    _bridge: str
    _namespace: str
    _relays: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    @property
    def disk(self) -> Path:
        """What the host sees as `here`, from outside."""
        return self.root / "disks" / self.name

    @property
    def here(self) -> Path:
        """Where the host's own files are, as its processes see them. The same path on every host."""
        return self.root / "h"

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The same command, on this host: its network, its name, its disk."""
        mounts = (
            f"mount --bind {self.disk} {self.here} && mount --bind {self.disk}/etc-hosts /etc/hosts && "
            f"mount -t tmpfs none {self.root}/disks && hostname {self.name}"
        )
        inside = ["sh", "-c", f'{mounts} && exec "$@"', "sh", *arguments]
        return ["ip", "netns", "exec", self._namespace, "unshare", "--uts", *inside]

    def environment(self, more: Mapping[str, str]) -> dict[str, str]:
        """This process's own variables without its settings of Graft, with the host's folders, and `more`."""
        plain = {name: value for name, value in os.environ.items() if not name.startswith("GRAFT_")}
        here = {"GRAFT_HOME": str(self.here / "home"), "TMPDIR": str(self.here / "tmp"), "HOME": str(self.here)}
        return {**plain, **here, **more}

    def popen(
        self, arguments: Sequence[str], log: str, environment: Mapping[str, str] | None = None
    ) -> "subprocess.Popen[bytes]":
        """Starts a process on this host. Its output is appended to the file `log` of the host's disk."""
        with open(self.disk / log, "ab") as output:
            return subprocess.Popen(
                self.command(arguments),
                env=self.environment(environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def run(self, arguments: Sequence[str], environment: Mapping[str, str] | None = None, stdin: str = "") -> str:
        """Runs a command on this host to its end; returns what it printed."""
        done = subprocess.run(
            self.command(arguments),
            env=self.environment(environment or {}),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, f"{self.name}: {arguments[:4]}: {done.stderr}\n{self.last_lines()}"
        return done.stdout

    def listening(self, port: int, seconds: float = 60, address: str = "") -> None:
        """Waits until something on this host listens on a port of its address."""
        self.run([sys.executable, "-c", LISTENING, address or self.address, str(port), str(seconds)])

    def pids(self) -> list[int]:
        """All processes of the host."""
        asked = subprocess.run(["ip", "netns", "pids", self._namespace], capture_output=True, text=True)
        return [int(pid) for pid in asked.stdout.split()]

    def processes(self) -> dict[psutil.Process, list[str]]:
        """The same with their arguments, without those that have ended since they were listed."""
        found = {}
        for pid in self.pids():
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                found[process] = process.cmdline()
        return found

    def titles(self) -> list[str]:
        """Their command lines."""
        return [" ".join(arguments) for arguments in self.processes().values()]

    def files(self, pattern: str) -> dict[str, int]:
        """Names of files of the disk, with their bytes. They may come and go meanwhile."""
        found = {}
        for name in glob.glob(pattern, root_dir=self.disk, recursive=True, include_hidden=True):
            with suppress(FileNotFoundError):
                if (self.disk / name).is_file():
                    found[name] = (self.disk / name).stat().st_size
        return found

    def tunnel(self, to: "Host", port: int) -> int:
        """A port of this process's own loopback that leads, by this host's network, to a port of another host."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            arguments = [sys.executable, "-c", RELAY, str(listener.fileno()), to.address, str(port)]
            relay = subprocess.Popen(self.command(arguments), pass_fds=[listener.fileno()], start_new_session=True)
            self._relays.append(relay)
            return int(listener.getsockname()[1])

    def cut(self) -> None:
        """Pulls the host's cable."""
        _ip("-n", self._bridge, "link", "set", f"to-{self.name}", "down")

    def heal(self) -> None:
        """Plugs it in again."""
        _ip("-n", self._bridge, "link", "set", f"to-{self.name}", "up")

    @contextmanager
    def apart_from(self, *others: "Host") -> Iterator[None]:
        """In the block nothing goes to or comes from these hosts; all reach everybody else."""
        for other in others:
            self._cut_from(other)
        try:
            yield
        finally:
            for other in others:
                self._heal_from(other)

    def _cut_from(self, other: "Host") -> None:
        for one, two in ((self, other), (other, self)):
            entry = ("neigh", "replace", two.address, "lladdr", NOBODY_MAC, "dev", "eth0", "nud", "permanent")
            _ip("-n", one._namespace, *entry)

    def _heal_from(self, other: "Host") -> None:
        for one, two in ((self, other), (other, self)):
            _ip("-n", one._namespace, "neigh", "del", two.address, "dev", "eth0")

    def kill(self) -> None:
        """As a power cut: no process is left, and none has said goodbye. `heal` brings the empty machine back."""
        self.cut()
        self.end()

    def end(self) -> None:
        """Ends every process of the host."""
        deadline = time.monotonic() + 20
        while pids := self.pids():
            assert time.monotonic() < deadline, f"{self.name} does not end: {self.titles()}"
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def last_lines(self, count: int = 15) -> str:
        """The ends of its logs."""
        ends = []
        for log in sorted(self.disk.glob("*.log")):
            lines = log.read_text(errors="replace").splitlines()[-count:]
            ends.append("\n".join([f"--- {self.name}: {log.name}", *(line[:400] for line in lines)]))
        return "\n".join(ends)


def why_not() -> str:
    """Why there can be no hosts here; empty when there can."""
    if os.geteuid() != 0:
        return "hosts of their own take root: network namespaces joined by veth"
    if shutil.which("ip") is None:
        return "`ip` is missing (Debian: apt-get install iproute2)"
    probe = f"graft-{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode != 0:
        return f"no network namespace can be made here: {made.stderr.strip()}"
    try:
        joined = subprocess.run(
            ["ip", "-n", probe, "link", "add", "one", "type", "veth", "peer", "name", "two"],
            capture_output=True,
            text=True,
        )
    finally:
        _ip("netns", "del", probe)
    return f"no veth can be made here: {joined.stderr.strip()}" if joined.returncode != 0 else ""


@contextmanager
def network(*names: str) -> Iterator[dict[str, Host]]:
    """Hosts with these names, joined by a bridge. Skips aloud where there can be none."""
    if reason := why_not():
        pytest.skip(reason)
    # Short: sockets lie below it, and a socket's path has 107 characters at most. The number keeps two runs apart.
    root = Path(tempfile.mkdtemp(prefix="gh", dir="/tmp"))
    root.chmod(0o755)  # PostgreSQL is not root
    (root / "h").mkdir()
    mine = f"graft-{os.getpid()}"
    bridge = f"{mine}-net"
    hosts = {
        name: Host(name, f"{SUBNET}.{number}", root, bridge, f"{mine}-{name}")
        for number, name in enumerate(names, start=1)
    }
    with ExitStack() as ending:  # one that does not end keeps no other from being ended
        ending.callback(shutil.rmtree, root, ignore_errors=True)
        ending.callback(subprocess.run, ["ip", "netns", "del", bridge], capture_output=True)
        _ip("netns", "add", bridge)
        _ip("-n", bridge, "link", "add", "br0", "type", "bridge")
        _ip("-n", bridge, "link", "set", "br0", "up")
        for host in hosts.values():
            ending.callback(_remove, host)
            _join(host, hosts)
        yield hosts


def _remove(host: Host) -> None:
    try:
        host.end()
        for relay in host._relays:
            relay.wait(10)
    finally:
        subprocess.run(["ip", "netns", "del", host._namespace], capture_output=True)


def _join(host: Host, hosts: Mapping[str, Host]) -> None:
    for folder in ("home", "tmp"):
        (host.disk / folder).mkdir(parents=True)
    (host.disk / "tmp").chmod(0o1777)
    # As Debian has it: a machine's own name is on its loopback, and says nothing of how others reach it.
    others = [f"{other.address} {other.name}" for other in hosts.values() if other is not host]
    lines = ["127.0.0.1 localhost", f"127.0.1.1 {host.name}", *others]
    (host.disk / "etc-hosts").write_text("\n".join(lines) + "\n")
    namespace = host._namespace
    _ip("netns", "add", namespace)
    end = f"to-{host.name}"
    _ip("-n", host._bridge, "link", "add", end, "type", "veth", "peer", "name", "eth0", "netns", namespace)
    _ip("-n", host._bridge, "link", "set", end, "master", "br0", "up")
    _ip("-n", namespace, "link", "set", "lo", "up")
    _ip("-n", namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
    _ip("-n", namespace, "link", "set", "eth0", "up")
