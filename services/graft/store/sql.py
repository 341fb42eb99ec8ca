"""The store on SQLAlchemy: SQLite embedded, PostgreSQL by URL. Puts the parts together and migrates the schema."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, create_engine, select, text
from sqlalchemy.exc import OperationalError

from graft.domain.errors import FailedPrecondition, Unavailable
from graft.store.checks import CheckStore
from graft.store.database import Database, link_arguments, parse_url, ping, token_after
from graft.store.datasets import DatasetStore
from graft.store.deployments import DeploymentStore
from graft.store.evaluations import EvaluationStore
from graft.store.jobs import JobStore
from graft.store.keys import KeyStore
from graft.store.lead import LeadStore
from graft.store.leases import LeaseStore
from graft.store.mirror import MirrorStore
from graft.store.protocol import Listed
from graft.store.tables import schema_readers

_MIGRATION_LOCK = 0x67726166
"""PostgreSQL advisory lock ("graf" in ASCII), so that two processes that start together migrate once."""

_DRIVERS = {"sqlite": "sqlite", "postgresql": "postgresql+psycopg"}
"""The blocking ones: migrations run in a thread or a process of their own."""


class SqlStore(
    DatasetStore,
    CheckStore,
    JobStore,
    LeaseStore,
    LeadStore,
    EvaluationStore,
    MirrorStore,
    DeploymentStore,
    KeyStore,
):
    """`graft.store.protocol.Store` on one database."""

    def led_by(self, owner: str) -> "SqlStore":
        """The same store for the one that leads."""
        return SqlStore(self._database.led_by(owner))

    async def close(self) -> None:
        """Closes every connection."""
        await self._database.close()

    async def ping(self) -> None:
        """Raises Unavailable when the database does not answer."""
        await ping(self._database)

    def token_after(self, item: Listed) -> str:
        """The token of the page that begins behind this item of its list."""
        return token_after(item)

    async def now(self) -> datetime:
        """The database's clock, UTC."""
        async with self._database.read() as connection:
            return await self._database.now(connection)


def open_store(url: str) -> SqlStore:
    """A store on an already migrated database. Connects on first use. Raises InvalidArgument for a wrong URL."""
    return SqlStore(Database(url))


@dataclass(frozen=True)
class Migrated:
    """What a migration has done."""

    before: str
    """The schema's revision; empty for a database without one."""
    after: str


def migrate(url: str, revision: str = "head") -> Migrated:
    """Brings the database to a revision, the newest by default; creates an SQLite file's folder. Blocking; many may
    call at once.

    A database that a newer Graft has migrated is left as it is where that one says that this one can use it.

    Raises InvalidArgument for a URL that is none of the store's, FailedPrecondition for a database that this Graft
    cannot use, sqlalchemy.exc.OperationalError when the database cannot be reached.
    """
    parsed = parse_url(url)
    if parsed.get_backend_name() == "sqlite":
        parsed = parsed.set(drivername="sqlite")
        Path(str(parsed.database)).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(parsed, connect_args=link_arguments(parsed))
    try:
        with engine.begin() as connection:
            if engine.dialect.name == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _MIGRATION_LOCK})
            else:
                # Two processes that start together: the second waits here, then finds nothing to do.
                connection.exec_driver_sql("PRAGMA busy_timeout=30000")
                connection.exec_driver_sql("BEGIN EXCLUSIVE")
            config = _config()
            config.attributes["connection"] = connection
            before = _revision(connection)
            if _is_newer_and_usable(connection, before):
                return Migrated(before, before)
            command.upgrade(config, revision)
            return Migrated(before, _revision(connection))
    except CommandError as error:
        raise _newer(str(error)) from error
    finally:
        engine.dispose()


def check_schema(url: str) -> None:
    """For a process that leaves migrating to others. Changes nothing. Blocking.

    Raises FailedPrecondition STORE_IS_NEWER or STORE_IS_OLDER for a database that this Graft cannot use as it is,
    Unavailable for one that does not answer, InvalidArgument as `migrate`.
    """
    try:
        found, needed = schema_revision(url)
    except OperationalError as error:
        raise Unavailable(
            f"The database does not answer: {error.orig}. Check GRAFT_STORE_URL.", reason="STORE_UNAVAILABLE"
        ) from None
    if found > needed:
        raise _newer(f"revision {found}, and this one knows {needed}")
    if found < needed:
        raise FailedPrecondition(
            f"The database has schema revision {found or 'none'}, and this Graft needs {needed}. Run "
            "`python -m graft.store.main migrate`, or start the gateway, which does so.",
            reason="STORE_IS_OLDER",
        )


def _newer(found: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"The database has a schema that this Graft does not know ({found}). A newer Graft has migrated it: "
        "run that one, or point GRAFT_STORE_URL at another database.",
        reason="STORE_IS_NEWER",
    )


def schema_revision(url: str) -> tuple[str, str]:
    """The revision of the database's schema, empty when it has none, and the one that this Graft needs, which is the
    same for a newer schema that it can use. Changes nothing. Raises as `migrate`."""
    parsed = parse_url(url)
    engine = create_engine(
        parsed.set(drivername=_DRIVERS[parsed.get_backend_name()]), connect_args=link_arguments(parsed)
    )
    try:
        with engine.connect() as connection:
            found = _revision(connection)
            return found, found if _is_newer_and_usable(connection, found) else _head()
    finally:
        engine.dispose()


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", "graft.store:migrations")
    config.set_main_option("path_separator", "os")
    return config


def _head() -> str:
    return str(ScriptDirectory.from_config(_config()).get_current_head())


def _is_newer_and_usable(connection: Connection, found: str) -> bool:
    """Whether a newer Graft has migrated the database to `found`, in a way that this one can use. Revisions are numbers
    of four digits."""
    if found <= _head():
        return False
    oldest = connection.execute(select(schema_readers.c.oldest)).scalar_one()
    return bool(oldest <= _head())


def _revision(connection: Connection) -> str:
    return MigrationContext.configure(connection).get_current_revision() or ""
