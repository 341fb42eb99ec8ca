"""The hosts that other tests run on are what they say they are: apart, cut when cut, gone when gone."""

import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from tests.support.hosts import network

pytestmark = pytest.mark.integration


def fetch(port: int, path: str = "/etc/hostname", timeout_seconds: float = 20) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=timeout_seconds) as answer:
        return str(answer.read().decode())


def eventually_fetch(port: int, path: str) -> str:
    """Once the server listens, which on a busy machine takes seconds: until then the tunnel hangs up at once."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return fetch(port, path)
        except (TimeoutError, urllib.error.URLError, ConnectionError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def test_each_host_has_a_disk_a_name_and_a_link_of_its_own() -> None:
    with network("a", "b", "c") as hosts:
        a, b, c = hosts.values()
        (a.disk / "mine").write_text("of a")
        (b.disk / "mine").write_text("of b")
        assert a.files("**/m*") == {"mine": 4}
        b.popen([sys.executable, "-m", "http.server", "--bind", b.address, "8000", "--directory", "/"], "web.log")
        from_a, from_c = a.tunnel(b, 8000), c.tunnel(b, 8000)
        mine = f"{a.here}/mine"
        assert eventually_fetch(from_a, mine) == "of b"
        assert eventually_fetch(from_c, mine) == "of b"
        listed = subprocess.run(
            b.command(["sh", "-c", f"hostname; ls {b.root}/disks"]), capture_output=True, text=True, check=True
        )
        assert listed.stdout.split() == ["b"]

        with a.apart_from(b):
            with pytest.raises((TimeoutError, urllib.error.URLError)):
                fetch(from_a, mine, timeout_seconds=1)
            assert fetch(from_c, mine) == "of b"
        assert eventually_fetch(from_a, mine) == "of b"

        b.cut()
        for port in (from_a, from_c):
            with pytest.raises((TimeoutError, urllib.error.URLError)):
                fetch(port, mine, timeout_seconds=1)
        b.heal()
        assert eventually_fetch(from_c, mine) == "of b"

        b.kill()
        assert b.pids() == []
        b.heal()
        with pytest.raises((ConnectionError, urllib.error.URLError)):
            fetch(from_a, mine)
        root = a.root
    assert not root.exists()
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert a._namespace not in left
