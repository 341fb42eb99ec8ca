"""Commands about what a gateway keeps: datasets, adapters."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from graft.cli.connect import connect
from graft.cli.output import Json, failures, local_time, print_json, short_id, show, show_fields, show_one, size_text
from graft.cli.uploading import Format, upload
from graft.cli.validating import datasets_validate

if TYPE_CHECKING:
    from graft.api.v1.adapter_pb2 import ReplicaResidency

DatasetId = Annotated[str, typer.Argument(help="Id of a data set, as `datasets list` shows it.")]
AdapterModel = Annotated[str, typer.Argument(metavar="BASE:ADAPTER", help="An adapter, for example base:reviews.")]
VersionModel = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="base:adapter@version, base:adapter@alias, or base:adapter: its champion."),
]

datasets = typer.Typer(no_args_is_help=True, help="Upload, validate, list and delete data sets.")
adapters = typer.Typer(no_args_is_help=True, help="List, name and place adapters.")


def add_to(app: typer.Typer) -> None:
    """Adds these commands to the main one."""
    datasets.command("validate")(datasets_validate)
    app.add_typer(datasets, name="datasets")
    app.add_typer(adapters, name="adapters")


@datasets.command("upload")
def datasets_upload(
    file: Annotated[str, typer.Argument(help="JSONL, CSV or Parquet file, or an fsspec URL: s3://, https:// …")],
    name: Annotated[str, typer.Option(help="Name for people; the file's own when not given.")] = "",
    format: Format = "",
    as_json: Json = False,
) -> None:
    """Upload a data set. Every row is checked before anything is stored; its format is recognised and shown."""
    with failures(as_json=as_json), connect() as graft:
        from graft.client.requests import format_name

        data = upload(graft, file, name, format=format)
        found = f"{format_name(data.format)}, {data.row_count} rows, {size_text(data.size_bytes)}"
        show_one(data, f"{short_id(data.name)}  {found}", as_json=as_json)


@datasets.command("list")
def datasets_list(as_json: Json = False) -> None:
    """List data sets, newest first."""
    with failures(as_json=as_json), connect() as graft:
        from graft.client.requests import format_name

        columns: dict[str, Callable[..., object]] = {
            "ID": lambda d: short_id(d.name),
            "NAME": lambda d: d.display_name,
            "FORMAT": lambda d: format_name(d.format),
            "ROWS": lambda d: d.row_count,
            "SIZE": lambda d: size_text(d.size_bytes),
            "CREATED": lambda d: local_time(d.create_time),
        }
        none = "No data sets yet. Upload one with `graft datasets upload FILE`."
        show(graft.datasets(), columns, as_json=as_json, none=none)


@datasets.command("get")
def datasets_get(dataset: DatasetId, as_json: Json = False) -> None:
    """Show one data set."""
    with failures(as_json=as_json), connect() as graft:
        from graft.client.requests import format_name

        data = graft.dataset(dataset)
        fields = {
            "id": short_id(data.name),
            "name": data.display_name,
            "rows": data.row_count,
            "format": format_name(data.format),
            "size": size_text(data.size_bytes),
            "digest": data.digest,
            "created": local_time(data.create_time),
        }
        show_fields(data, fields, as_json=as_json)


@datasets.command("delete")
def datasets_delete(dataset: DatasetId, as_json: Json = False) -> None:
    """Delete a data set. Refused while a job or an evaluation that has not ended uses it."""
    with failures(as_json=as_json), connect() as graft:
        graft.delete_dataset(dataset)
    if as_json:
        print_json({"deleted": short_id(dataset)})
    else:
        print(f"Data set {short_id(dataset)} is deleted.")


@adapters.command("list")
def adapters_list(as_json: Json = False) -> None:
    """List adapters and their aliases."""
    with failures(as_json=as_json), connect() as graft:
        columns: dict[str, Callable[..., object]] = {
            "MODEL": lambda a: a.model,
            "NEWEST": lambda a: a.newest_version,
            "ALIASES": lambda a: _aliases(a.aliases),
        }
        none = "No adapters yet. Train one with `graft tune create MODEL DATASET`."
        show(graft.adapters(), columns, as_json=as_json, none=none)


@adapters.command("get")
def adapters_get(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="base:adapter, or one version of it after an `@`.")],
    as_json: Json = False,
) -> None:
    """Show an adapter or, with @version or @alias, one of its versions."""
    with failures(as_json=as_json), connect() as graft:
        if "@" not in model:
            adapter = graft.adapter(model)
            fields = {
                "model": adapter.model,
                "newest version": adapter.newest_version,
                "aliases": _aliases(adapter.aliases),
                "created": local_time(adapter.create_time),
            }
            show_fields(adapter, fields, as_json=as_json)
            return
        version = graft.adapter_version(model)
        fields = {
            "model": version.model,
            "aliases": ", ".join(version.aliases),
            "task": version.task,
            "rank": version.rank,
            "size": size_text(version.size_bytes),
            **{name: f"{value:g}" for name, value in sorted(version.metrics.items())},
            "job": short_id(version.fine_tuning_job),
            "digest": version.digest,
            "base model digest": version.base_model_digest,
            "data set digest": version.dataset_digest,
            "MLflow run": version.mlflow_run_id,
            "created": local_time(version.create_time),
        }
        show_fields(version, fields, as_json=as_json)


@adapters.command("versions")
def adapters_versions(model: AdapterModel, as_json: Json = False) -> None:
    """List an adapter's versions, newest first."""
    with failures(as_json=as_json), connect() as graft:
        columns: dict[str, Callable[..., object]] = {
            "MODEL": lambda v: v.model,
            "ALIASES": lambda v: ", ".join(v.aliases),
            "RANK": lambda v: v.rank,
            "SIZE": lambda v: size_text(v.size_bytes),
            "JOB": lambda v: short_id(v.fine_tuning_job),
            "CREATED": lambda v: local_time(v.create_time),
        }
        show(graft.adapter_versions(model), columns, as_json=as_json)


@adapters.command("alias")
def adapters_alias(
    model: AdapterModel,
    alias: Annotated[str, typer.Argument(help="For example champion or candidate.")],
    version: Annotated[int, typer.Argument(help="Version that the alias shall name.")],
    as_json: Json = False,
) -> None:
    """Point an alias at a version. Requests follow at once."""
    with failures(as_json=as_json), connect() as graft:
        adapter = graft.set_alias(model, alias, version)
        show_one(adapter, f"{adapter.model}@{alias} is version {version}.", as_json=as_json)


@adapters.command("load")
def adapters_load(model: VersionModel, as_json: Json = False) -> None:
    """Load a version into every replica, so that its first request does not wait."""
    with failures(as_json=as_json), connect() as graft:
        _show_residency(graft.load_adapter(model), as_json=as_json)


@adapters.command("unload")
def adapters_unload(model: VersionModel, as_json: Json = False) -> None:
    """Take a version out of every replica. The next request for it loads it again."""
    with failures(as_json=as_json), connect() as graft:
        _show_residency(graft.unload_adapter(model), as_json=as_json)


@adapters.command("residency")
def adapters_residency(as_json: Json = False) -> None:
    """Show what every replica holds."""
    with failures(as_json=as_json), connect() as graft:
        _show_residency(graft.residency(), as_json=as_json)


def _show_residency(replicas: "Sequence[ReplicaResidency]", *, as_json: bool) -> None:
    def held(replica: "ReplicaResidency") -> str:
        from graft.api.v1.adapter_pb2 import ResidentAdapter

        # One of another project has no name here.
        return ", ".join(
            (adapter.model or "another project's") + ("" if adapter.tier == ResidentAdapter.TIER_ENGINE else " (disk)")
            for adapter in replica.adapters
        )

    columns: dict[str, Callable[..., object]] = {
        "REPLICA": lambda r: r.replica,
        "READY": lambda r: "yes" if r.ready else "no",
        "HOLDS": lambda r: f"{len(r.adapters)} of {r.capacity}",
        "ADAPTERS": held,
    }
    show(replicas, columns, as_json=as_json, none="No replica of the inference service answers.")


def _aliases(aliases: Mapping[str, int]) -> str:
    return ", ".join(f"{alias} → {number}" for alias, number in sorted(aliases.items()))
