"""The whole system on six hosts of its own, started once. Takes root; says so where it is skipped."""

from collections.abc import Generator, Iterator

import pytest

from tests.support.healing import note, pytest_terminal_summary
from tests.support.host_cluster import HostCluster, host_cluster
from tests.support.tiny_jobs import sums, write_rows

__all__ = ["note", "pytest_terminal_summary"]


@pytest.fixture(scope="package")
def cluster() -> Iterator[HostCluster]:
    with host_cluster() as made:
        yield made


@pytest.fixture(scope="package")
def dataset(cluster: HostCluster, tmp_path_factory: pytest.TempPathFactory) -> str:
    name: str = cluster.graft.upload_dataset(write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", sums(40))).name
    return name


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Shows the ends of the hosts' logs below a failed test."""
    report = yield
    cluster = getattr(item, "funcargs", {}).get("cluster")
    if report.failed and isinstance(cluster, HostCluster):
        report.sections.append(("Logs of the hosts", cluster.last_lines()))
    return report
