"""Runs showcases one after the other: `python -m showcase [NAME ...] [--quick]`, all of them without a name.

Starts the stack unless it runs, and stops it again unless it ran. Interrupted, it goes on with the next call.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from graft import offline
from graft.domain.errors import GraftError

ROOT = Path(__file__).resolve().parents[1]
QUICK_DOCS = ROOT / "build" / "showcase"
"""Where `--quick` writes: a smoke run must not replace a measurement."""


def main() -> int:
    """0 when every showcase was measured, whatever was found; 1 for the first that could not be."""
    offline.stay()
    from graft.client import Connection, Graft
    from graft.settings import load
    from graft.stack import local
    from showcase import page, plans
    from showcase.running import Run

    by_name = {plan.name: plan for plan in plans.PLANS}
    parser = argparse.ArgumentParser(prog="python -m showcase", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(by_name))
    parser.add_argument("--quick", action="store_true", help="a few rows and steps, to see that it runs")
    parser.add_argument("--keep", action="store_true", help="leave the stack running")
    asked = parser.parse_args()
    if unknown := [name for name in asked.names if name not in by_name]:
        parser.error(f"there is no {', '.join(unknown)}; there are {', '.join(by_name)}")
    console = Console()
    docs = QUICK_DOCS if asked.quick else ROOT / "docs"
    try:
        settings = load()
        running = local.read_status(settings.home.path)
        if running is None:
            with console.status("Starting the stack"):
                local.start_detached(settings)
        try:
            gateway = settings.gateway
            with Graft(Connection(address=f"{gateway.host}:{gateway.grpc_port}")) as graft:
                for name in asked.names or by_name:
                    plan = plans.quick(by_name[name]) if asked.quick else by_name[name]
                    result = Run(settings, graft, console, plan, quick=asked.quick).do()
                    console.print(page.section(result), highlight=False, markup=False, soft_wrap=True)
                    console.print(f"Written to {page.write(result, docs)}.", highlight=False, soft_wrap=True)
        finally:
            if running is None and not asked.keep:
                with console.status("Stopping the stack"):
                    local.stop(settings.home.path)
    except GraftError as error:
        print(f"showcase: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("showcase: interrupted; the same command goes on from here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
