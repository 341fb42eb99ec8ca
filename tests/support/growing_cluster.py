"""A Ray head without CPUs, and Ray's own autoscaler, which starts nodes on this machine when something asks for them.

As `ray.cluster_utils.AutoscalingCluster`, which ends every other Ray of the machine when it starts.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graft.stack.processes import tcp_probe
from tests.support.serving_stack import descendants, free_ports

HEAD_ID = "f" * 51 + "00000"
"""Ray's provider of nodes on one machine counts from it."""
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"


@contextmanager
def growing_cluster(folder: Path, groups: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yields the head's address. `groups`: resources, labels and max_workers by name; all begin with no node."""
    from ray._private.services import get_node_ip_address
    from ray.autoscaler._private.kuberay.autoscaling_config import _generate_legacy_autoscaling_config_fields

    (port,) = free_ports(1)
    address = f"{get_node_ip_address()}:{port}"
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    config = {
        "cluster_name": "growing",
        "max_workers": 8,
        "provider": {
            "type": "external",
            "module": PROVIDER,
            "gcs_address": address,
            "launch_multiple": True,
            "head_node_id": HEAD_ID,
            "disable_launch_config_check": True,
            "disable_node_updaters": True,
        },
        "available_node_types": {
            "ray.head.default": head,
            **{name: {"node_config": {}, "min_workers": 0, **group} for name, group in groups.items()},
        },
        "head_node_type": "ray.head.default",
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 10,
        **_generate_legacy_autoscaling_config_fields(),
    }
    file, log = folder / "autoscaler.json", folder / "ray.log"
    file.write_text(json.dumps(config))
    sockets = tempfile.mkdtemp(prefix="gr", dir="/tmp")  # Unix socket paths end at 107 characters
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"]
    command += ["--num-cpus=0", f"--autoscaling-config={file}", f"--temp-dir={sockets}", "--include-dashboard=false"]
    command += ["--object-store-memory=104857600", "--disable-usage-stats"]
    environment = os.environ | {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        "GRAFT_TEST_STACK": str(folder),
    }
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        answers = tcp_probe(address.rpartition(":")[0], port)
        deadline = time.monotonic() + 120
        while not answers():
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.1)
        yield address
    finally:
        for left in descendants(folder):
            left.kill()
        process.wait()
        shutil.rmtree(sockets, ignore_errors=True)
