"""The engine's own process: forked from a server that has imported everything, and never outliving its replica.

vLLM spawns its engine core afresh, which costs 20 s of imports each time. A fork server pays that once, while the
replica does its own imports on another core, and a dead engine is replaced in the time that the model takes to load.
vLLM's core also outlives a parent that is killed; the kernel's parent-death signal ends it in every case.
Does not know what the engine does. Linux only, as is vLLM's CPU build.
"""

import ctypes
import multiprocessing
import os
import signal
from multiprocessing import forkserver
from pathlib import Path

from graft import offline

PRELOAD = "graft.serving.preload"
_PR_SET_PDEATHSIG = 1
"""From <linux/prctl.h>."""


def die_with_parent() -> None:
    """Has the kernel kill this process when the thread that forked it ends, however it ends (prctl(2))."""
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        # It ended before the signal was set, so none will come.
        os.kill(os.getpid(), signal.SIGKILL)


def prepare_environment(torch_folder: Path, threads: int) -> None:
    """Sets what vLLM, torch and OpenMP read from the environment when they are imported here or in a child."""
    offline.stay()
    os.environ.update(
        {
            # Ray sets it to the actor's num_cpus, which is a share for placement and not the engine's width.
            "OMP_NUM_THREADS": str(threads),
            # Training shares the cores: threads pinned to them would wait for each other.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "TOKENIZERS_PARALLELISM": "false",
            # vLLM compiles nothing with LoRA on a CPU, but for one function of its sampler: the first request with
            # `logprobs` then stopped everyone for 14 s while a C++ compiler ran.
            "TORCHDYNAMO_DISABLE": "1",
            # Our own executor runs the model in the core, and the fork server replaces the start method.
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        }
    )
    # At WARNING a start prints forty lines, none of which asks for anything.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # torch's own libgomp first, as vLLM's CPU platform asks (https://github.com/vllm-project/vllm/issues/27369); it
    # would set this too late for the fork server.
    libraries = sorted(str(path) for path in (torch_folder / "lib").glob("libgomp*.so*"))
    if libraries and "libgomp" not in os.environ.get("LD_PRELOAD", ""):
        os.environ["LD_PRELOAD"] = ":".join(filter(None, [os.environ.get("LD_PRELOAD"), libraries[0]]))


def start_fork_server() -> None:
    """Starts the fork server, which then imports on its own. Returns at once.

    Call it from a thread that lives as long as this process: the kernel ends the server with that thread.
    """
    multiprocessing.set_forkserver_preload([PRELOAD])
    forkserver.ensure_running()


def fork_engine_cores() -> None:
    """Makes vLLM start its engine core through the fork server."""
    from vllm.v1.engine import utils

    utils.get_mp_context = lambda: multiprocessing.get_context("forkserver")
