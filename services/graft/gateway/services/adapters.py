"""AdapterService over the core."""

from typing import Any

from graft.api.v1 import adapter_pb2, adapter_service_pb2, adapter_service_pb2_grpc
from graft.gateway import convert
from graft.gateway.core import Core
from graft.gateway.services.names import ANY, parent_project, split
from graft.gateway.services.pages import fitting

_ADAPTER = ("baseModels", "adapters")
_VERSION = ("baseModels", "adapters", "versions")


class AdapterService(adapter_service_pb2_grpc.AdapterServiceServicer):
    """Lists, names and places adapters."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def GetAdapter(self, request: adapter_service_pb2.GetAdapterRequest, _context: Any) -> adapter_pb2.Adapter:
        """One adapter."""
        return convert.adapter(await self._core.get_adapter(*split(request.name, *_ADAPTER)))

    async def ListAdapters(
        self, request: adapter_service_pb2.ListAdaptersRequest, _context: Any
    ) -> adapter_service_pb2.ListAdaptersResponse:
        """A page of one base model's adapters, or of all for `-`."""
        project, base = split(request.parent, "baseModels", field="parent")
        page = await self._core.list_adapters(
            project, None if base == ANY else base, request.page_size, request.page_token
        )
        return adapter_service_pb2.ListAdaptersResponse(
            adapters=[convert.adapter(one) for one in page.items], next_page_token=page.next_page_token
        )

    async def GetAdapterVersion(
        self, request: adapter_service_pb2.GetAdapterVersionRequest, _context: Any
    ) -> adapter_pb2.AdapterVersion:
        """One version, by number or alias."""
        project, base, adapter, selector = split(request.name, *_VERSION)
        version = await self._core.get_version(project, base, adapter, selector)
        return convert.version(version, (await self._core.get_adapter(project, base, adapter)).aliases)

    async def ListAdapterVersions(
        self, request: adapter_service_pb2.ListAdapterVersionsRequest, _context: Any
    ) -> adapter_service_pb2.ListAdapterVersionsResponse:
        """A page, newest first."""
        project, base, adapter = split(request.parent, *_ADAPTER, field="parent")
        aliases = (await self._core.get_adapter(project, base, adapter)).aliases
        return await fitting(
            self._core,
            request.page_size,
            lambda size: self._core.list_versions(project, base, adapter, size, request.page_token),
            lambda page: adapter_service_pb2.ListAdapterVersionsResponse(
                adapter_versions=[convert.version(one, aliases) for one in page.items],
                next_page_token=page.next_page_token,
            ),
        )

    async def SetAdapterAlias(
        self, request: adapter_service_pb2.SetAdapterAliasRequest, _context: Any
    ) -> adapter_pb2.Adapter:
        """Waits until the registry has it."""
        project, base, adapter = split(request.name, *_ADAPTER)
        return convert.adapter(await self._core.set_alias(project, base, adapter, request.alias, request.version))

    async def LoadAdapterVersion(
        self, request: adapter_service_pb2.LoadAdapterVersionRequest, _context: Any
    ) -> adapter_service_pb2.LoadAdapterVersionResponse:
        """Into the engine of every replica."""
        project, base, adapter, selector = split(request.name, *_VERSION)
        replicas = await self._core.load_version(project, base, adapter, selector)
        return adapter_service_pb2.LoadAdapterVersionResponse(replicas=convert.replicas(replicas))

    async def UnloadAdapterVersion(
        self, request: adapter_service_pb2.UnloadAdapterVersionRequest, _context: Any
    ) -> adapter_service_pb2.UnloadAdapterVersionResponse:
        """Out of the engine of every replica."""
        project, base, adapter, selector = split(request.name, *_VERSION)
        replicas = await self._core.unload_version(project, base, adapter, selector)
        return adapter_service_pb2.UnloadAdapterVersionResponse(replicas=convert.replicas(replicas))

    async def GetResidency(
        self, request: adapter_service_pb2.GetResidencyRequest, _context: Any
    ) -> adapter_service_pb2.GetResidencyResponse:
        """What every replica holds, asked now."""
        replicas = await self._core.residency(parent_project(request.parent))
        return adapter_service_pb2.GetResidencyResponse(replicas=convert.replicas(replicas))
