"""A Graft one version newer than this one: its schema has a column more, and what it writes has fields more.

    python -m tests.support.newer_graft migrate | gateway | orchestrator

Of wishes it writes what this version does, as a newer one does with jobs that do not use what is new in it.
"""

import sys
from typing import Any

from sqlalchemy import Engine, create_engine, make_url, text

from graft.domain.evaluations import EvaluationSpec
from graft.domain.jobs import JobSpec
from graft.domain.stored import to_json
from graft.settings import load
from graft.store import checks, deployments, evaluations, jobs, leases, mirror
from graft.store.sql import migrate

REVISION = "9999"
FIELD = "newer"


def sync_engine(url: str) -> Engine:
    """Connects to a store's database without its driver for asyncio."""
    parsed = make_url(url)
    return create_engine(parsed.set(drivername="sqlite") if parsed.get_backend_name() == "sqlite" else parsed)


def migrate_as_newer(url: str, oldest_reader: str = "") -> str:
    """Returns the revision that this Graft knows, which can use the database unless an `oldest_reader` is named."""
    head = migrate(url).after
    engine = sync_engine(url)
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE jobs ADD COLUMN later VARCHAR DEFAULT ''"))
        connection.execute(text("UPDATE alembic_version SET version_num = :revision"), {"revision": REVISION})
        connection.execute(text("UPDATE schema_readers SET oldest = :oldest"), {"oldest": oldest_reader or head})
    engine.dispose()
    return head


def with_more(value: Any) -> Any:
    """JSON with a field more in every object whose names are not data."""
    if isinstance(value, list):
        return [with_more(one) for one in value]
    if not isinstance(value, dict):
        return value
    grown = {name: one if name in ("metadata", "settings") else with_more(one) for name, one in value.items()}
    return {**grown, FIELD: {"of": [1]}}


def _written(value: Any) -> Any:
    told = to_json(value)
    return told if isinstance(value, JobSpec | EvaluationSpec) else with_more(told)


def main() -> int:
    """The exit code of the process that it becomes."""
    if sys.argv[1] == "migrate":
        migrate_as_newer(load().store_url)
        return 0
    for module in (checks, deployments, evaluations, jobs, leases, mirror):
        module.__dict__["to_json"] = _written
    if sys.argv[1] == "gateway":
        from graft.gateway.main import main as run
    else:
        from graft.orchestrator.main import main as run
    return run()


if __name__ == "__main__":
    sys.exit(main())
