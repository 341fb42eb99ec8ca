"""What the stack listens on while it serves and a job trains on two workers: loopback, but for torch's store."""

import ipaddress
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from ..support.serving_stack import Stack, descendants, ray_cluster, serving_stack

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

TRAIN = """
import json, sys, time
from pathlib import Path
from contextlib import suppress
from dataclasses import replace
import ray
from graft.domain.jobs import Lora, OverLengthPolicy
from graft.domain.resources import DatasetFormat
from graft.settings import load
from graft.training.run import RayRuns
from graft.training.spec import RunSpec
folder, settings = Path(sys.argv[1]), load()
data = folder / "rows.jsonl"
data.write_text("".join(json.dumps({"prompt": f"{n} is ", "completion": str(n % 2)}) + "\\n" for n in range(40)))
spec = RunSpec(
    job_id="ft-loopback", attempt=1, base_model="tiny", base_model_path=str(folder / "base"),
    base_model_digest="sha256:b", dataset_path=str(data), dataset_format=DatasetFormat.PROMPT_COMPLETION,
    validation_path=None, validation_format=None, output_dir=str(folder / "runs"), total_steps=1_000_000,
    batch_size=8, learning_rate=1e-3, warmup_ratio=0.0, weight_decay=0.0, max_grad_norm=1.0, context_tokens=64,
    seed=0, num_workers=2, checkpoint_steps=1_000_000, over_length_policy=OverLengthPolicy.DROP,
    lora=Lora(4, 8.0, 0.0, ("q_proj",)),
)
ray.init(address=settings.ray_address, namespace="graft", log_to_driver=False)
runs = RayRuns()
runs.start(spec)
while not any(report.kind == "metrics" for report in runs.poll(spec.job_id, 1, 0).reports):
    time.sleep(0.2)
print("training", flush=True)
sys.stdin.read()
"""
"""A driver that trains for ever, as the orchestrator would start it; it says so once the first step is done."""


@dataclass(frozen=True)
class Listener:
    """A socket that others can connect or send to."""

    process: str
    kind: str
    address: str
    port: int

    @property
    def on_loopback(self) -> bool:
        address = ipaddress.ip_address(self.address)
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
            address = address.ipv4_mapped
        return address.is_loopback


def listeners(folder: Path) -> list[Listener]:
    found: set[Listener] = set()
    for process in descendants(folder):
        with suppress(psutil.NoSuchProcess):
            found |= listening(process)
    return sorted(found, key=lambda item: (item.process, item.address, item.port))


def listening(process: psutil.Process) -> set[Listener]:
    title, found = " ".join(process.cmdline())[:70], set()
    for connection in process.net_connections(kind="inet"):
        udp = connection.type == socket.SOCK_DGRAM
        if connection.status == psutil.CONN_LISTEN or (udp and not connection.raddr):
            found.add(Listener(title, "udp" if udp else "tcp", connection.laddr.ip, connection.laddr.port))
    return found


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with serving_stack(tmp_path_factory.mktemp("stack"), dashboard=True, GRAFT_RAY_NUM_CPUS="4") as stack:
        yield stack


def test_everything_listens_on_loopback_only(stack: Stack) -> None:
    command = [sys.executable, "-c", TRAIN, str(stack.folder)]
    with subprocess.Popen(command, env=stack.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as driver:
        assert driver.stdout is not None
        try:
            assert driver.stdout.readline() == b"training\n"
            found = listeners(stack.folder)
        finally:
            driver.kill()
    for item in found:
        print(f"{item.kind} {item.address}:{item.port}  {item.process}")
    assert len({item.process for item in found}) > 5
    # torch's store, by which the workers of a job find each other: Ray Train has no option for its address.
    open_ones = [item.process.strip() for item in found if not item.on_loopback]
    assert open_ones == ["ray::RayTrainWorker"], open_ones


def test_the_service_ends_when_its_ray_was_replaced_by_another(stack: Stack) -> None:
    lost = [process for process in descendants(stack.folder) if process.pid != stack.process.pid]
    for process in lost:
        process.kill()
    psutil.wait_procs(lost)
    with ray_cluster(stack.settings, stack.environment, stack.folder):
        assert stack.process.wait(150) != 0  # whoever started it starts it again
