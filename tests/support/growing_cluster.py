"""A Ray head without CPUs, and Ray's own autoscaler, the second, which starts and ends nodes on this machine.

In the place of `ray.cluster_utils.AutoscalingCluster`, which reads a file that is not in Ray's wheel, and ends every
other Ray of the machine when it starts.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graft.settings import load
from graft.stack.processes import ray_environment
from tests.support.ports import free_ports
from tests.support.serving_stack import ray_cluster

IDLE_SECONDS = 4.0


@contextmanager
def growing_cluster(folder: Path, groups: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yields the head's address. `groups`: resources, labels and max_workers by name; all begin with no node."""
    from ray._private.services import get_node_ip_address
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FakeMultiNodeProvider
    from ray.autoscaler._private.kuberay.autoscaling_config import _generate_legacy_autoscaling_config_fields

    port, dashboard_port = free_ports(2)
    settings = load(
        {
            "GRAFT_HOME": str(folder / "ray-home"),
            "GRAFT_RAY_HOST": get_node_ip_address(),  # a driver here takes loopback for it
            "GRAFT_RAY_PORT": str(port),
            "GRAFT_RAY_DASHBOARD_PORT": str(dashboard_port),
            "GRAFT_RAY_OBJECT_STORE_MIB": "80",
        }
    )
    address = f"{settings.ray.host}:{port}"
    config = {
        "cluster_name": "growing",
        "max_workers": 8,
        "provider": {
            # By the name `fake_multinode` Ray looks for defaults that are not in its wheel either.
            "type": "external",
            "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__qualname__}",
            "gcs_address": address,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
            "disable_launch_config_check": True,
            "disable_node_updaters": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            **{name: {"node_config": {}, "min_workers": 0, **group} for name, group in groups.items()},
        },
        "head_node_type": "ray.head.default",
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": IDLE_SECONDS / 60,
        **_generate_legacy_autoscaling_config_fields(),
    }
    file = folder / "autoscaler.json"
    file.write_text(json.dumps(config))
    environment = {
        **os.environ,
        **ray_environment(settings),
        # This process is the driver, and has had its Ray without tokens from other tests.
        "RAY_AUTH_MODE": "disabled",
        "GRAFT_TEST_STACK": str(folder),
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }
    with ray_cluster(settings, environment, folder, "--num-cpus=0", f"--autoscaling-config={file}"):
        yield address
