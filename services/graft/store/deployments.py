"""Which base models are to be served beside the first one. The gateway writes the wish, the orchestrator how far it is.

A row is the wish: it outlives a stack that stops, and goes when what it asked for has ended.
"""

from contextlib import suppress
from dataclasses import asdict

from sqlalchemy import delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from graft.domain.deployments import Deployment, DeploymentState
from graft.domain.errors import AlreadyExists, FailedPrecondition, unknown
from graft.domain.jobs import JobError
from graft.domain.stored import to_json
from graft.store import convert
from graft.store.database import Database, by_key
from graft.store.protocol import Page
from graft.store.tables import deployments


class DeploymentStore:
    """The part of the store that keeps deployments."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create_deployment(self, wish: Deployment) -> Deployment:
        """Stores the wish, or returns the deployment that there is; a FAILED one starts anew.

        Raises AlreadyExists when the id names another model or is another project's, FailedPrecondition while a
        deployment of that id is on its way out.
        """
        while True:
            with suppress(IntegrityError):
                async with self._database.write() as connection:
                    await connection.execute(insert(deployments).values(**asdict(wish)))
                return wish
            found = await self.find_deployment(wish.base_model)
            if found is None:  # it has ended since the insert
                continue
            if (found.project, found.source) != (wish.project, wish.source):
                raise AlreadyExists(
                    f"{wish.base_model!r} is deployed already"
                    + (f", from {found.source}" if found.project == wish.project else " by another project")
                    + ". Take another name.",
                    reason="DEPLOYMENT_EXISTS",
                    metadata={"name": wish.base_model},
                )
            if found.state is DeploymentState.STOPPING:
                raise FailedPrecondition(
                    f"{wish.base_model!r} is still being undeployed. Try again in a moment.",
                    reason="DEPLOYMENT_STOPPING",
                    metadata={"name": wish.base_model},
                )
            if found.state is not DeploymentState.FAILED:
                return found
            if await self._start_anew(wish):
                return wish

    async def _start_anew(self, wish: Deployment) -> bool:
        """False where it is not FAILED any more."""
        failed = update(deployments).where(
            deployments.c.base_model == wish.base_model, deployments.c.state == DeploymentState.FAILED
        )
        values = {"state": DeploymentState.STARTING, "error": None, "create_time": wish.create_time}
        async with self._database.write() as connection:
            return (await connection.execute(failed.values(values))).rowcount == 1

    async def get_deployment(self, project: str, base: str) -> Deployment:
        """Raises NotFound naming it and what exists in the project."""
        mine = select(deployments).where(deployments.c.project == project)
        async with self._database.read() as connection:
            row = (await connection.execute(mine.where(deployments.c.base_model == base))).mappings().one_or_none()
            if row is not None:
                return convert.deployment(row)
            names = mine.with_only_columns(deployments.c.base_model).order_by(deployments.c.base_model)
            existing = (await connection.execute(names)).scalars().all()
        raise unknown("deployment", base, list(existing))

    async def find_deployment(self, base: str) -> Deployment | None:
        """The deployment that serves `base`, whoever asked for it, or None."""
        query = select(deployments).where(deployments.c.base_model == base)
        async with self._database.read() as connection:
            row = (await connection.execute(query)).mappings().one_or_none()
        return None if row is None else convert.deployment(row)

    async def list_deployments(self, project: str, page_size: int, page_token: str) -> Page[Deployment]:
        """In order of id. Raises InvalidArgument for a bad token."""
        query = select(deployments).where(deployments.c.project == project)
        async with self._database.read() as connection:
            page = await by_key(connection, query, [deployments.c.base_model], page_size, page_token, down=False)
        return Page(tuple(convert.deployment(row) for row in page.items), page.next_page_token)

    async def every_deployment(self) -> tuple[Deployment, ...]:
        """Of all projects, oldest first."""
        query = select(deployments).order_by(deployments.c.create_time, deployments.c.base_model)
        async with self._database.read() as connection:
            return tuple(convert.deployment(row) for row in (await connection.execute(query)).mappings())

    async def request_undeploy(self, project: str, base: str) -> Deployment:
        """Marks it as STOPPING, which the orchestrator carries out, and returns it so. Idempotent. Raises NotFound."""
        mine = update(deployments).where(deployments.c.project == project, deployments.c.base_model == base)
        stopping = mine.values(state=DeploymentState.STOPPING, error=None).returning(*deployments.c)
        async with self._database.write() as connection:
            row = (await connection.execute(stopping)).mappings().one_or_none()
        # Not read again: the orchestrator may have ended it by then.
        return await self.get_deployment(project, base) if row is None else convert.deployment(row)

    async def move_deployment(self, base: str, state: DeploymentState, error: JobError | None = None) -> bool:
        """Tells how far it is. False where a wish to undeploy came meanwhile, or it has failed: both stay."""
        moving = update(deployments).where(
            deployments.c.base_model == base,
            deployments.c.state.in_((DeploymentState.STARTING, DeploymentState.READY)),
        )
        values = {"state": state, "error": to_json(error)}
        async with self._database.write(leading=True) as connection:
            return (await connection.execute(moving.values(values))).rowcount == 1

    async def remove_deployment(self, base: str) -> None:
        """Forgets one whose engine has ended."""
        gone = delete(deployments).where(
            deployments.c.base_model == base, deployments.c.state == DeploymentState.STOPPING
        )
        async with self._database.write(leading=True) as connection:
            await connection.execute(gone)
