"""The read model of the registry, the base models, and the wishes to point an alias."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy import JSON, Select, Table, and_, bindparam, delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from graft.domain.errors import SHOWN, NotFound, unknown
from graft.domain.jobs import JobError
from graft.domain.resources import Adapter, AdapterVersion, BaseModel, RegistrySnapshot
from graft.domain.stored import to_json
from graft.store import convert
from graft.store.database import Database, by_key
from graft.store.protocol import AliasWish, Page
from graft.store.tables import adapter_versions, adapters, alias_wishes, base_models

_VERSION = select(adapter_versions).where(
    adapter_versions.c.project == bindparam("project"),
    adapter_versions.c.base_model == bindparam("base"),
    adapter_versions.c.adapter == bindparam("name"),
)
_BY_VERSION = _VERSION.where(adapter_versions.c.version == bindparam("version"))
_BY_ALIAS = _VERSION.join(
    adapters,
    and_(
        adapters.c.project == adapter_versions.c.project,
        adapters.c.base_model == adapter_versions.c.base_model,
        adapters.c.adapter == adapter_versions.c.adapter,
    ),
).where(
    adapter_versions.c.version == adapters.c.aliases[bindparam("alias", type_=JSON.JSONStrIndexType())].as_integer()
)
"""Built once: to put such a statement together takes as long as to run it."""


class MirrorStore:
    """The part of the store that repeats what the registry says, so that names resolve without it."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def replace_base_models(self, models: Sequence[BaseModel]) -> None:
        """Makes the table equal to `models`, in one transaction."""
        async with self._database.write(leading=True) as connection:
            await self._database.lock(connection, base_models)
            await connection.execute(delete(base_models))
            if models:
                await connection.execute(insert(base_models), [_json_ready(asdict(model)) for model in models])

    async def get_base_model(self, base: str, project: str | None = None) -> BaseModel:
        """Raises NotFound naming it and what exists, as `project` sees it: without other projects' own."""
        async with self._database.read() as connection:
            return await _base_model(connection, base, project)

    async def list_base_models(self, project: str | None = None) -> tuple[BaseModel, ...]:
        """In order of id, as `project` sees them; all when None."""
        async with self._database.read() as connection:
            rows = (await connection.execute(_visible(project).order_by(base_models.c.id))).mappings()
            return tuple(convert.base_model(row) for row in rows)

    async def replace_registry(self, snapshot: RegistrySnapshot) -> None:
        """Makes the read model equal to the snapshot, in one transaction; what is so already is not written."""
        async with self._database.write(leading=True) as connection:
            await self._database.lock(connection, adapters)
            await _make_equal(connection, adapter_versions, convert.adapter_version, snapshot.versions)
            await _make_equal(connection, adapters, convert.adapter, snapshot.adapters)

    async def get_adapter(self, project: str, base: str, adapter: str) -> Adapter:
        """Raises NotFound naming it and what exists (also when the base model does not exist)."""
        async with self._database.read() as connection:
            return await _adapter(connection, project, base, adapter)

    async def list_adapters(self, project: str, base: str | None, page_size: int, page_token: str) -> Page[Adapter]:
        """In order of base model and name; of every base model when `base` is None."""
        query = select(adapters).where(adapters.c.project == project)
        async with self._database.read() as connection:
            if base is not None:
                await _base_model(connection, base, project)
                query = query.where(adapters.c.base_model == base)
            keys = [adapters.c.base_model, adapters.c.adapter]
            page = await by_key(connection, query, keys, page_size, page_token, down=False)
        return Page(tuple(convert.adapter(row) for row in page.items), page.next_page_token)

    async def resolve_version(
        self, project: str, base: str, adapter: str, *, version: int | None, alias: str | None
    ) -> AdapterVersion:
        """Raises NotFound naming the adapter, version or alias and what exists."""
        async with self._database.read() as connection:
            # Every request to generate comes here: one statement, and what exists is looked up only for a refusal.
            wanted = {"project": project, "base": base, "name": adapter, "version": version, "alias": alias}
            selected = _BY_ALIAS if version is None else _BY_VERSION
            row = (await connection.execute(selected, wanted)).mappings().one_or_none()
            if row is not None:
                return convert.adapter_version(row)
            found = await _adapter(connection, project, base, adapter)
            if version is None:
                if alias not in found.aliases:
                    existing = [f"{base}:{adapter}@{name}" for name in sorted(found.aliases)]
                    raise unknown("alias", f"{base}:{adapter}@{alias}", existing)
                version = found.aliases[alias]
            query = _versions(project, base, adapter)
            ordered = query.with_only_columns(adapter_versions.c.version).order_by(adapter_versions.c.version.desc())
            existing = [f"{base}:{adapter}@{number}" for number in (await connection.execute(ordered)).scalars()]
        raise unknown("adapter version", f"{base}:{adapter}@{version}", existing)

    async def list_versions(
        self, project: str, base: str, adapter: str, page_size: int, page_token: str
    ) -> Page[AdapterVersion]:
        """Newest first. Raises NotFound for an unknown adapter."""
        async with self._database.read() as connection:
            await _adapter(connection, project, base, adapter)
            keys = [adapter_versions.c.version]
            query = _versions(project, base, adapter)
            page = await by_key(connection, query, keys, page_size, page_token, down=True)
        return Page(tuple(convert.adapter_version(row) for row in page.items), page.next_page_token)

    async def request_alias(self, wish: AliasWish) -> AliasWish:
        """Stores a wish for the orchestrator to carry out."""
        async with self._database.write() as connection:
            now = await self._database.now(connection)
            await connection.execute(insert(alias_wishes).values(**asdict(wish), create_time=now))
        return wish

    async def get_alias_wish(self, wish_id: str) -> AliasWish:
        """Raises NotFound."""
        async with self._database.read() as connection:
            query = select(alias_wishes).where(alias_wishes.c.id == wish_id)
            row = (await connection.execute(query)).mappings().one_or_none()
        if row is None:
            raise NotFound(f"Alias wish {wish_id!r} does not exist.", reason="ALIAS_WISH_NOT_FOUND")
        return convert.alias_wish(row)

    async def pending_alias_wishes(self) -> tuple[AliasWish, ...]:
        """Oldest first."""
        query = select(alias_wishes).where(alias_wishes.c.done.is_(False))
        async with self._database.read() as connection:
            rows = (await connection.execute(query.order_by(alias_wishes.c.create_time, alias_wishes.c.id))).mappings()
            return tuple(convert.alias_wish(row) for row in rows)

    async def finish_alias_wish(self, wish_id: str, error: JobError | None) -> None:
        """Marks a wish as carried out, or as refused with `error`."""
        values = {"done": True, "error": to_json(error)}
        async with self._database.write(leading=True) as connection:
            await connection.execute(update(alias_wishes).where(alias_wishes.c.id == wish_id).values(values))


async def _make_equal(
    connection: AsyncConnection, table: Table, read: Callable[[convert.Row], Any], items: Sequence[Any]
) -> None:
    """One alias moves among thousands: the table is compared, and only what differs is written."""
    keys = [key.name for key in table.primary_key]
    wanted = {tuple(getattr(item, key) for key in keys): item for item in items}
    rows = (await connection.execute(select(table))).mappings()
    stored = {tuple(row[key] for key in keys): read(row) for row in rows}
    same = {key for key, item in wanted.items() if stored.get(key) == item}
    if leaving := [dict(zip(keys, values, strict=True)) for values in stored.keys() - same]:
        await connection.execute(delete(table).where(*(table.c[key] == bindparam(key) for key in keys)), leaving)
    if fresh := [asdict(item) for key, item in wanted.items() if key not in same]:
        await connection.execute(insert(table), fresh)


def _json_ready(values: dict[str, object]) -> dict[str, object]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _versions(project: str, base: str, adapter: str) -> Select[Any]:
    return select(adapter_versions).where(
        adapter_versions.c.project == project,
        adapter_versions.c.base_model == base,
        adapter_versions.c.adapter == adapter,
    )


def _visible(project: str | None) -> Select[Any]:
    every = select(base_models)
    return every if project is None else every.where(base_models.c.project.in_(("", project)))


async def _base_model(connection: AsyncConnection, base: str, project: str | None) -> BaseModel:
    visible = _visible(project)
    row = (await connection.execute(visible.where(base_models.c.id == base))).mappings().one_or_none()
    if row is not None:
        return convert.base_model(row)
    ids = visible.with_only_columns(base_models.c.id).order_by(base_models.c.id)
    existing = (await connection.execute(ids)).scalars()
    raise unknown("base model", base, list(existing))


async def _adapter(connection: AsyncConnection, project: str, base: str, adapter: str) -> Adapter:
    mine = select(adapters).where(adapters.c.project == project, adapters.c.base_model == base)
    row = (await connection.execute(mine.where(adapters.c.adapter == adapter))).mappings().one_or_none()
    if row is not None:
        return convert.adapter(row)
    await _base_model(connection, base, project)
    # Anybody can ask for a name that does not exist, and there may be a hundred thousand that do.
    first = mine.with_only_columns(adapters.c.adapter).order_by(adapters.c.adapter).limit(SHOWN)
    existing = [f"{base}:{name}" for name in (await connection.execute(first)).scalars()]
    total = (await connection.execute(mine.with_only_columns(func.count()))).scalar_one()
    raise unknown("adapter", f"{base}:{adapter}", existing, total)
