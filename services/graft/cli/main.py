"""The `graft` command: the local stack, and the groups of commands that talk to a gateway.

Those are in `graft.cli.models`, `graft.cli.remote`, `graft.cli.tuning`, `graft.cli.evaluating` and
`graft.cli.talking`; `graft.cli.tasks` needs none. Settings and stack are imported only by the commands that need them.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from graft.cli import evaluating, models, remote, talking, tasks, tuning
from graft.cli.output import Json, JsonLines, console, failures, print_json, print_table

if TYPE_CHECKING:
    from graft.settings import Settings
    from graft.stack.supervisor import Status

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Fine-tunes language models and serves the results.",
    epilog="Exit codes: 0 success, 1 failure, 2 a wrong argument, setting or state, 3 not found, 4 unavailable, "
    "130 Ctrl-C.",
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"graft {version('graft')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Fine-tunes language models and serves the results."""
    del version  # its callback has answered


Config = Annotated[Path | None, typer.Option(help="Settings file, as GRAFT_CONFIG names it.")]


def _use(config: Path | None) -> None:
    """What this process starts reads the same file."""
    if config is not None:
        os.environ["GRAFT_CONFIG"] = str(config.absolute())


@app.command()
def up(
    detach: Annotated[
        bool, typer.Option("--detach", help="Return when ready, also if it runs already; stop with `graft down`.")
    ] = False,
    config: Config = None,
    as_json: JsonLines = False,
) -> None:
    """Start what the settings do not place elsewhere by an address, and keep it running until Ctrl-C."""
    from graft import settings as graft_settings
    from graft.stack import local

    _use(config)
    with failures(as_json=as_json):
        settings = graft_settings.load()
        if detach:
            if as_json:
                local.start_detached(settings)
            else:
                with console.status("Starting the local stack"):
                    started = local.start_detached(settings)
                if not started:
                    print("The stack is running already.")
            _print_ready(settings, as_json=as_json)
            return
        told: dict[str, str] = {}

        def on_change(statuses: Sequence["Status"]) -> None:
            for status in statuses:
                if told.get(status.name) == status.state:
                    continue
                told[status.name] = status.state
                _print_status(status, as_json=as_json)
            if all(status.state == "ready" for status in statuses):
                _print_ready(settings, as_json=as_json)

        local.run(settings, on_change)


def _print_status(status: "Status", *, as_json: bool) -> None:
    if as_json:
        from dataclasses import asdict

        print_json(asdict(status), line=True)
    else:
        ready = status.state == "ready" and status.ready_seconds is not None
        print(
            f"{status.name:14} {status.state}" + (f" after {status.ready_seconds:.0f} s" if ready else ""), flush=True
        )


def _print_ready(settings: "Settings", *, as_json: bool) -> None:
    http = f"{settings.gateway_url}/v1"
    if as_json:
        where = {"grpc": settings.gateway_address, "http": http, "mlflow": settings.tracking_uri}
        print_json({"ready": True, **where, "logs": str(settings.home.path / "logs")}, line=True)
    else:
        print(
            f"Ready. gRPC {settings.gateway_address}, HTTP {http}, MLflow {settings.tracking_uri}, "
            f"logs {settings.home.path / 'logs'}",
            flush=True,
        )


@app.command()
def down(as_json: Json = False) -> None:
    """Stop the local stack and all its processes."""
    from graft import settings as graft_settings
    from graft.stack import local

    with failures(as_json=as_json):
        stopped = local.stop(graft_settings.load().home.path)
    if as_json:
        print_json({"stopped": stopped})
    else:
        print("Stopped." if stopped else "No stack is running.")


@app.command()
def demo(
    report: Annotated[Path | None, typer.Option(help="Where to write the HTML report.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the stack running.")] = False,
    as_json: Json = False,
) -> None:
    """Train two adapters on real data and compare them with their base. Exit code 1 when the first does not win."""
    from graft import settings as graft_settings
    from graft.cli import demo as demonstration
    from graft.cli import demo_outcome

    # With --json standard output holds nothing else.
    out = Console(stderr=True) if as_json else console
    with failures(as_json=as_json):
        settings = graft_settings.load()
        outcome = demonstration.Demo(settings, out, report).run(keep=keep)
    if as_json:
        print_json(demo_outcome.as_json(outcome))
    else:
        demo_outcome.print_outcome(console, outcome)
    raise typer.Exit(0 if outcome.report.passed else 1)


@app.command()
def status(as_json: Json = False) -> None:
    """Show the local stack's processes. Exit code 4 when none runs."""
    from graft import settings as graft_settings
    from graft.stack import local

    with failures(as_json=as_json):
        record = local.read_status(graft_settings.load().home.path)
    if as_json:
        print_json(record or {"ready": False, "processes": []})
    elif record is None:
        print("No stack is running. Start one with `graft up`.")
    else:
        print_table(
            ["PROCESS", "STATE", "PID", "RESTARTS", "LOG"],
            [[one["name"], one["state"], one["pid"] or "", one["restarts"], one["log"]] for one in record["processes"]],
        )
    raise typer.Exit(0 if record else 4)


@app.command()
def doctor(config: Config = None, as_json: Json = False) -> None:
    """Check whether the stack can run here, what the settings place elsewhere, and whether the running one is well.

    Exit code 1 when a check fails.
    """
    from dataclasses import asdict

    from graft.stack.doctor import examine

    _use(config)
    checks = examine()
    healthy = all(check.state != "fail" for check in checks)
    if as_json:
        print_json({"healthy": healthy, "checks": [asdict(check) for check in checks]})
    else:
        from rich.text import Text

        styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
        print_table(
            ["STATE", "CHECK", "FOUND"],
            [
                [Text(check.state, styles[check.state]), check.name, f"{check.message} {check.fix}".rstrip()]
                for check in checks
            ],
        )
    raise typer.Exit(0 if healthy else 1)


app.add_typer(models.models, name="models")
remote.add_to(app)
evaluating.add_to(app)
app.add_typer(tuning.tune, name="tune")
app.add_typer(tasks.tasks, name="tasks")
talking.add_to(app)


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
