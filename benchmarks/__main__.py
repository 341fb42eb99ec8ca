"""Runs benchmarks one after the other: `python -m benchmarks [NAME ...] [--quick]`, all of them without a name."""

import argparse
import subprocess
import sys

from benchmarks.common import ROOT, console

ALL = (
    *("training", "jobs", "mixed_adapters", "gateway", "cpu_lora", "data_memory"),
    *("scale_state", "scale", "scale_serving"),
)
"""In this order: what matters most first, should the time run out."""


def main() -> int:
    """The exit code is the highest of any: 0 when every check of every benchmark has passed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(ALL))
    parser.add_argument("--quick", action="store_true", help="one short round each, to see that they run")
    asked = parser.parse_args()
    if unknown := [name for name in asked.names if name not in ALL]:
        parser.error(f"there is no {', '.join(unknown)}; there are {', '.join(ALL)}")
    codes = [0]
    for name in asked.names or ALL:
        console.rule(name)
        command = [sys.executable, "-m", f"benchmarks.{name}", *(["--quick"] if asked.quick else [])]
        codes.append(subprocess.run(command, cwd=ROOT).returncode)
    return max(codes)


if __name__ == "__main__":
    raise SystemExit(main())
