"""The process that stands between a grader and untrusted code: `python -I -S _launcher.py`, standard library only.

Reads a request from standard input, builds a place with nothing in it, starts one Python there, watches it, and writes
what became of it to standard output. Started and read by `graft.grading.sandbox`, whose docstring says what the place
denies. It is a program of its own because namespaces need a process with one thread, which no caller can promise.
"""

import contextlib
import ctypes
import errno
import json
import os
import resource
import select
import signal
import stat
import struct
import sys
import time
from typing import Any, NoReturn

NOBODY = 65534
READ_BYTES = 65536
PROGRAM_FD, PROOF_FD = 3, 4
START_SECONDS = 1.0
"""Added to the wall time for the start of Python: 20 ms, and far more where every core is taken."""
MAX_FILES = 32
MAX_FILE_BYTES = 16 * 2**20
WORK_BYTES = 16 * 2**20
WORK_FILES = 1000

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
NAMESPACES = CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
MNT_DETACH = 2
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
SECCOMP_MODE_FILTER = 2
SYS_MOUNT_SETATTR = 442

# Per machine: its AUDIT_ARCH, pivot_root, clone, and the calls that are denied with EPERM: those that reach outside the
# namespaces (AF_VSOCK knows no network namespace, io_uring opens sockets past this filter), that keep memory which
# RLIMIT_AS does not count, that open namespaces anew, or that look into other processes and the kernel.
MACHINES: dict[str, tuple[int, int, int, dict[str, int]]] = {
    "x86_64": (
        0xC000003E,
        155,
        56,
        {
            "shmget": 29, "socket": 41, "semget": 64, "msgget": 68, "ptrace": 101, "pivot_root": 155, "mount": 165,
            "umount2": 166, "mq_open": 240, "add_key": 248, "request_key": 249, "keyctl": 250, "unshare": 272,
            "perf_event_open": 298, "open_by_handle_at": 304, "setns": 308, "process_vm_readv": 310,
            "process_vm_writev": 311, "memfd_create": 319, "bpf": 321, "userfaultfd": 323, "io_uring_setup": 425,
            "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsmount": 432, "mount_setattr": 442,
            "memfd_secret": 447,
        },
    ),
    "aarch64": (
        0xC00000B7,
        41,
        220,
        {
            "umount2": 39, "mount": 40, "pivot_root": 41, "unshare": 97, "ptrace": 117, "mq_open": 180, "msgget": 186,
            "semget": 190, "shmget": 194, "socket": 198, "add_key": 217, "request_key": 218, "keyctl": 219,
            "perf_event_open": 241, "open_by_handle_at": 265, "setns": 268, "process_vm_readv": 270,
            "process_vm_writev": 271, "memfd_create": 279, "bpf": 280, "userfaultfd": 282, "io_uring_setup": 425,
            "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsmount": 432, "mount_setattr": 442,
            "memfd_secret": 447,
        },
    ),
}  # fmt: skip
SYS_CLONE3 = 435

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


class SetupError(Exception):
    """The kernel refused a part of the sandbox."""


def main() -> None:
    request = json.loads(sys.stdin.buffer.read())
    try:
        machine = MACHINES.get(os.uname().machine)
        if machine is None:
            raise SetupError(f"a machine of kind {os.uname().machine} has no table of system calls")
        _enter_namespaces()
        _build_root(request["python"], request["paths"], machine[1])
        _become_nobody()
        result = _run(request, machine)
    except SetupError as error:
        result = {"fault": str(error)}
    sys.stdout.write(json.dumps(result))
    sys.stdout.flush()


def _enter_namespaces() -> None:
    """New namespaces of every kind; inside, user 65534 is the caller's own user, or nobody where that is root."""
    child_reads, parent_writes = os.pipe()
    launcher = os.getpid()
    outside_user, outside_group = os.geteuid(), os.getegid()
    writer = os.fork()  # the maps must be written from outside
    if writer == 0:
        status = 1
        try:
            os.close(parent_writes)
            if os.read(child_reads, 1):
                if outside_user == 0:
                    _write(f"/proc/{launcher}/uid_map", f"0 0 1\n{NOBODY} {NOBODY} 1\n")
                    _write(f"/proc/{launcher}/gid_map", f"0 0 1\n{NOBODY} {NOBODY} 1\n")
                else:
                    _write(f"/proc/{launcher}/uid_map", f"{NOBODY} {outside_user} 1\n")
                    _write(f"/proc/{launcher}/setgroups", "deny")
                    _write(f"/proc/{launcher}/gid_map", f"{NOBODY} {outside_group} 1\n")
                status = 0
        except OSError as error:
            status = error.errno or 1
        finally:
            os._exit(status)
    os.close(child_reads)
    failed = libc.unshare(NAMESPACES) != 0
    error_number = ctypes.get_errno()
    if not failed:
        os.write(parent_writes, b"1")
    os.close(parent_writes)
    _, status = os.waitpid(writer, 0)
    if failed:
        raise SetupError(f"no new namespaces: {os.strerror(error_number)}")
    if status != 0:
        raise SetupError(f"the new user namespace takes no users: {os.strerror(os.waitstatus_to_exitcode(status))}")


def _build_root(python: str, paths: list[str], pivot_root: int) -> None:
    """A root of tmpfs with the interpreter's folders, read-only, and /tmp to write in."""
    _mount(None, "/", None, MS_REC | MS_PRIVATE, None)
    root = "/proc"  # any folder that exists everywhere and is not needed from here on
    _mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,nr_inodes=500,mode=0755")
    for path in paths:
        _expose(root, path)
    os.mkdir(f"{root}/tmp", 0o777)
    _mount("tmpfs", f"{root}/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={WORK_BYTES},nr_inodes={WORK_FILES},mode=0777")
    os.chdir(root)
    if libc.syscall(ctypes.c_long(pivot_root), b".", b".") != 0:
        raise SetupError(f"no new root: {os.strerror(ctypes.get_errno())}")
    if libc.umount2(b".", MNT_DETACH) != 0:
        raise SetupError(f"the old root stays: {os.strerror(ctypes.get_errno())}")
    os.chdir("/tmp")
    _read_only("/", recursive=False)
    if not os.access(python, os.X_OK):
        raise SetupError(f"the interpreter {python} is in none of {', '.join(paths)}")


def _expose(root: str, path: str) -> None:
    """Shows a file, a folder or a symbolic link of the outside at the same place below `root`."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    target = root + path
    os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
    if stat.S_ISLNK(mode):
        os.symlink(os.readlink(path), target)
        return
    if stat.S_ISDIR(mode):
        os.makedirs(target, exist_ok=True)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    _mount(path, target, None, MS_BIND | MS_REC, None)
    if not stat.S_ISCHR(mode):
        _read_only(target, recursive=True)


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None) -> None:
    arguments = [None if text is None else os.fsencode(text) for text in (source, target, kind, options)]
    if libc.mount(arguments[0], arguments[1], arguments[2], ctypes.c_ulong(flags), arguments[3]) != 0:
        raise SetupError(f"no mount on {target}: {os.strerror(ctypes.get_errno())}")


def _read_only(path: str, *, recursive: bool) -> None:
    attributes = struct.pack("=QQQQ", MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV, 0, 0, 0)
    arguments = (ctypes.c_long(AT_FDCWD), os.fsencode(path), ctypes.c_long(AT_RECURSIVE if recursive else 0))
    if libc.syscall(ctypes.c_long(SYS_MOUNT_SETATTR), *arguments, attributes, ctypes.c_size_t(len(attributes))) != 0:
        raise SetupError(
            f"{path} cannot be made read-only (Linux 5.12 or later is needed): {os.strerror(ctypes.get_errno())}"
        )


def _become_nobody() -> None:
    if os.geteuid() == 0:  # outside it was root: nothing that root owns may stay in reach
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    if os.getresuid() != (NOBODY,) * 3:
        raise SetupError(f"the code would run as user {os.geteuid()}")


def _run(request: dict[str, Any], machine: tuple[int, int, int, dict[str, int]]) -> dict[str, Any]:
    """Starts the untrusted Python as the first process of its PID namespace, whose end ends all of them."""
    program_out, program_in = os.pipe()
    proof_out, proof_in = os.pipe()
    output_out, output_in = os.pipe()
    fault_out, fault_in = os.pipe()
    deadline = time.monotonic() + request["limits"]["timeout_seconds"] + START_SECONDS
    child = os.fork()
    if child == 0:
        _become_untrusted(request, machine, program_out, proof_in, output_in, fault_in)
    for end in (program_out, proof_in, output_in, fault_in):
        os.close(end)
    return _Watch(request, child, program_in, proof_out, output_out, fault_out).until(deadline)


class _Watch:
    """Feeds the child its program, collects what it writes, and ends it at a limit."""

    def __init__(self, request: dict[str, Any], child: int, program: int, proof: int, output: int, fault: int) -> None:
        self._child = child
        self._max_output_bytes: int = request["limits"]["output_bytes"]
        self._to_write = memoryview(request["program"].encode("utf-8", "surrogatepass"))
        self._program = program
        self._collected = {proof: bytearray(), output: bytearray(), fault: bytearray()}
        self._proof, self._output, self._fault = proof, output, fault

    def until(self, deadline: float) -> dict[str, Any]:
        os.set_blocking(self._program, False)
        exited = os.pidfd_open(self._child)
        poll = select.poll()
        poll.register(exited, select.POLLIN)
        poll.register(int(sys.argv[1]), select.POLLIN)  # closes when the grader's process ends, however it ends
        poll.register(self._program, select.POLLOUT)
        for end in self._collected:
            poll.register(end, select.POLLIN)
        ended = None
        while ended is None:
            remaining = deadline - time.monotonic()
            ready = poll.poll(max(0, remaining) * 1000) if remaining > 0 else []
            if not ready:
                ended = "timeout"
            for end, _ in ready:
                if end == exited:
                    ended = "exited"
                elif end == self._program:
                    self._feed(poll)
                elif end in self._collected:
                    if not self._collect(end):
                        poll.unregister(end)
                    if len(self._collected[end]) > self._max_output_bytes:
                        ended = "output"
                else:
                    ended = "abandoned"
        if ended != "exited":
            os.kill(self._child, signal.SIGKILL)
        _, status = os.waitpid(self._child, 0)  # returns once every process of the namespace is gone
        for end in self._collected:
            os.set_blocking(end, False)
            while len(self._collected[end]) <= self._max_output_bytes and self._collect(end):
                pass
        if self._collected[self._fault]:
            raise SetupError(self._collected[self._fault].decode("utf-8", "replace"))
        return {
            "ended": ended,
            "exit_code": os.waitstatus_to_exitcode(status),
            "output": self._collected[self._output][: self._max_output_bytes].decode("utf-8", "replace"),
            "proof": self._collected[self._proof].decode("latin-1"),
        }

    def _feed(self, poll: select.poll) -> None:
        try:
            self._to_write = self._to_write[os.write(self._program, self._to_write) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self._to_write = self._to_write[:0]
        if not self._to_write:
            poll.unregister(self._program)
            os.close(self._program)

    def _collect(self, end: int) -> bool:
        try:
            data = os.read(end, READ_BYTES)
        except BlockingIOError:
            return False
        self._collected[end] += data
        return bool(data)


def _become_untrusted(
    request: dict[str, Any],
    machine: tuple[int, int, int, dict[str, int]],
    program: int,
    proof: int,
    output: int,
    fault: int,
) -> NoReturn:
    try:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        os.setsid()
        null = os.open("/dev/null", os.O_RDONLY)
        moved = [os.dup(end) for end in (program, proof, output, fault, null)]
        while min(moved) < 10:  # clear of the numbers that they are given below
            moved = [os.dup(end) for end in moved]
        program, proof, output, fault, null = moved
        for end, number in ((null, 0), (output, 1), (output, 2), (program, PROGRAM_FD), (proof, PROOF_FD)):
            os.dup2(end, number, inheritable=True)
        os.closerange(5, fault)
        os.closerange(fault + 1, 4096)
        os.set_inheritable(fault, False)
        limits = request["limits"]
        for kind, most in (
            (resource.RLIMIT_AS, limits["memory_bytes"]),
            (resource.RLIMIT_CPU, limits["cpu_seconds"]),
            (resource.RLIMIT_NPROC, limits["processes"] + 1),  # the launcher is the same user's
            (resource.RLIMIT_FSIZE, MAX_FILE_BYTES),
            (resource.RLIMIT_NOFILE, MAX_FILES),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_MEMLOCK, 0),
            (resource.RLIMIT_MSGQUEUE, 0),
        ):
            resource.setrlimit(kind, (most, most))
        os.umask(0o077)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        _deny_system_calls(machine)
        command = [request["python"], "-I", "-S", "-B", "-X", "utf8", "-c", request["runner"]]
        os.execve(request["python"], command, {"HOME": "/tmp", "PATH": "/nowhere"})
    except BaseException as error:  # noqa: BLE001 - there is nobody to raise to: the launcher reads it
        with contextlib.suppress(OSError):
            os.write(fault, f"the code could not be started: {error}".encode())
        os._exit(1)


def _deny_system_calls(machine: tuple[int, int, int, dict[str, int]]) -> None:
    """A seccomp filter (classic BPF over struct seccomp_data) that lives as long as the process and its children."""
    architecture, _, clone, denied = machine
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    kill, allow = 0x80000000, 0x7FFF0000
    refuse = 0x00050000 | errno.EPERM
    missing = 0x00050000 | errno.ENOSYS  # glibc then falls back to clone, whose flags can be read here
    numbers = sorted(denied.values())
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (answer, 0, 0, kill), (load, 0, 0, 0)]
    program += [(at_least, 0, 1, 0x40000000), (answer, 0, 0, refuse)]  # x32
    program += [(equal, 0, 1, SYS_CLONE3), (answer, 0, 0, missing)]
    for number in numbers:
        program += [(equal, 0, 1, number), (answer, 0, 0, refuse)]
    program += [(equal, 0, 3, clone), (load, 0, 0, 16), (any_bit, 0, 1, NAMESPACES), (answer, 0, 0, refuse)]
    program += [(answer, 0, 0, allow)]
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("@HP", len(program), ctypes.addressof(buffer))
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise SetupError(f"no_new_privs: {os.strerror(ctypes.get_errno())}")
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0) != 0:
        raise SetupError(f"no seccomp filter: {os.strerror(ctypes.get_errno())}")


def _write(path: str, text: str) -> None:
    handle = os.open(path, os.O_WRONLY)
    try:
        os.write(handle, text.encode())
    finally:
        os.close(handle)


if __name__ == "__main__":
    main()
