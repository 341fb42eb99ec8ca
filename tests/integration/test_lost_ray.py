"""The inference process whose Ray was killed, and started anew: it ends, for whoever started it to start it again."""

from pathlib import Path

import psutil
import pytest

from tests.support.serving_stack import descendants, ray_cluster, serving_stack

pytestmark = [pytest.mark.integration, pytest.mark.ray, pytest.mark.timeout(400)]


def test_the_service_ends_when_its_ray_was_replaced_by_another(tmp_path: Path) -> None:
    with serving_stack(tmp_path) as stack:
        lost = [process for process in descendants(stack.folder) if process.pid != stack.process.pid]
        for process in lost:
            process.kill()
        psutil.wait_procs(lost)
        with ray_cluster(stack.settings, stack.environment, stack.folder):
            assert stack.process.wait(150) != 0
