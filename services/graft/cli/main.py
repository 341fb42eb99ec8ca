"""The `graft` command. Client commands are in `graft.cli.remote`; the stack is imported only by those that run it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from graft import settings as graft_settings
from graft.cli import remote
from graft.cli.output import console, failures

if TYPE_CHECKING:
    from graft.stack.supervisor import Status

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

app = typer.Typer(no_args_is_help=True, help="Fine-tunes language models and serves the results.", add_completion=False)
remote.add_to(app)


@app.command()
def up(
    detach: Annotated[bool, typer.Option("--detach", help="Return when ready; stop with `graft down`.")] = False,
) -> None:
    """Start the local stack, and keep it running until Ctrl-C."""
    from graft.stack import local

    with failures():
        settings = graft_settings.load()
        if detach:
            with console.status("Starting the local stack"):
                local.start_detached(settings)
            console.print(_where(settings))
            return
        told: dict[str, str] = {}

        def on_change(statuses: Sequence["Status"]) -> None:
            for status in statuses:
                if told.get(status.name) == status.state:
                    continue
                told[status.name] = status.state
                took = (
                    f" after {status.ready_seconds:.0f} s" if status.state == "ready" and status.ready_seconds else ""
                )
                console.print(f"{status.name:14} {status.state}{took}", highlight=False)
            if all(status.state == "ready" for status in statuses):
                console.print(_where(settings))

        local.run(settings, on_change)


def _where(settings: graft_settings.Settings) -> str:
    gateway = settings.gateway
    return (
        f"Ready. gRPC {gateway.host}:{gateway.grpc_port}, HTTP http://{gateway.host}:{gateway.http_port}/v1, "
        f"MLflow {settings.tracking_uri}, logs {settings.home.path / 'logs'}"
    )


@app.command()
def down() -> None:
    """Stop the local stack and all its processes."""
    from graft.stack import local

    with failures():
        stopped = local.stop(graft_settings.load().home.path)
    console.print("Stopped." if stopped else "No stack is running.")


@app.command()
def demo(
    report: Annotated[Path | None, typer.Option(help="Where to write the HTML report.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the stack running.")] = False,
    as_json: Json = False,
) -> None:
    """Train two adapters on real data and compare them with their base. Exit code 1 when the first does not win."""
    from graft.cli import demo as demonstration

    # With --json standard output holds nothing else.
    out = Console(stderr=True) if as_json else console
    with failures():
        settings = graft_settings.load()
        outcome = demonstration.Demo(settings, out, report).run(keep=keep)
    if as_json:
        print(json.dumps(demonstration.as_json(outcome), indent=1))
    else:
        demonstration.print_outcome(console, outcome)
    raise typer.Exit(0 if outcome.report.passed else 1)


@app.command()
def status(as_json: Json = False) -> None:
    """Show the local stack's processes. Exit code 4 when none runs."""
    from graft.stack import local

    with failures():
        record = local.read_status(graft_settings.load().home.path)
    if as_json:
        print(json.dumps(record or {"ready": False, "processes": []}, indent=1))
    elif record is None:
        console.print("No stack is running. Start one with `graft up`.")
    else:
        for process in record["processes"]:
            restarts = f", restarted {process['restarts']} times" if process["restarts"] else ""
            console.print(f"{process['name']:14} {process['state']}{restarts}  {process['log']}", highlight=False)
    raise typer.Exit(0 if record else 4)


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
