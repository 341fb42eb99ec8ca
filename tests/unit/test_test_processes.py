"""What tests start beside themselves: on ports that nobody else gets, held where they are, and ended."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from graft.stack.preflight import RAY_CLIENT_PORT, RAY_WORKER_PORTS
from tests.support.ports import free_ports
from tests.support.processes import end, held, slowed

ASK = "import json; from tests.support.ports import free_ports; print(json.dumps(free_ports(50)), flush=True); input()"
COUNT = "import itertools\nfor number in itertools.count(): print(number, flush=True)"
KERNELS = Path("/proc/sys/net/ipv4/ip_local_port_range")


def test_no_port_is_given_to_two_processes_or_is_one_that_the_kernel_or_ray_gives() -> None:
    with subprocess.Popen([sys.executable, "-c", ASK], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        theirs = json.loads(other.stdout.readline())
        mine = free_ports(50) + free_ports(50)
        other.communicate(b"\n")
    given = [*theirs, *mine]
    assert len(set(given)) == 150
    first, last = map(int, KERNELS.read_text().split())
    assert not set(given) & {RAY_CLIENT_PORT, *RAY_WORKER_PORTS, *range(first, last + 1)}


@pytest.fixture
def counting() -> Iterator["subprocess.Popen[bytes]"]:
    """A process that writes a line after the other."""
    with subprocess.Popen([sys.executable, "-c", COUNT], stdout=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_a_process_is_held_slowed_and_goes_on(counting: "subprocess.Popen[bytes]") -> None:
    assert counting.stdout is not None
    process = psutil.Process(counting.pid)
    with held([process]):
        assert process.status() == psutil.STATUS_STOPPED
    with slowed([process], running_seconds=0.001, held_seconds=0.01):
        assert counting.stdout.readline()
    while int(counting.stdout.readline()) < 100_000:  # far more than fits into the pipe
        pass


def test_processes_that_have_ended_by_themselves_are_no_fault(counting: "subprocess.Popen[bytes]") -> None:
    process = psutil.Process(counting.pid)
    with held([process]):
        end([process])
        counting.wait()
    end([process])
    assert not process.is_running()
