"""Generates the gRPC stubs of `protos/` into `services/graft/{api,internal}/v1/`.

Owns the generated files; knows nothing of what is in them. Run by `make stubs`:

    .venv/bin/python deploy/setup/stubs.py
"""

import os
import shutil
import sys
from pathlib import Path

import google.api
import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """Writes the stubs and the copy of Google's common protos that `buf` reads. Returns protoc's exit code."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # protoc's mypy plugins
    common = Path(next(iter(google.api.__path__))).parent
    copy = ROOT / "build" / "googleapis"
    for package in ("api", "rpc"):
        for proto in sorted((common / package).glob("*.proto")):
            target = copy / "google" / package / proto.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(proto, target)
    out = ROOT / "services"
    for stale in out.glob("graft/*/v1/*_pb2*"):
        stale.unlink()
    protos = sorted(str(path.relative_to(ROOT / "protos")) for path in (ROOT / "protos").rglob("*.proto"))
    return int(
        protoc.main(
            [
                "protoc",
                f"-I{ROOT / 'protos'}",
                f"-I{common.parent}",
                f"-I{Path(grpc_tools.__file__).parent / '_proto'}",
                f"--python_out={out}",
                f"--grpc_python_out={out}",
                f"--mypy_out=quiet:{out}",
                f"--mypy_grpc_out=quiet:{out}",
                *protos,
            ]
        )
    )


if __name__ == "__main__":
    sys.exit(main())
