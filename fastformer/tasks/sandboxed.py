"""The program that runs a module and the doctests of one of its functions, once it can do no harm.

sandbox.py starts it and says what its walls are. It reads ``[source, tests, seconds, memory]`` as JSON.
"""

from __future__ import annotations

import errno
import io
import json
import os
import platform
import resource
import struct
import sys
import types

PASSED, FAILED, UNWALLED = 77, 1, 78  # exit codes; 0 would be that of code which ends the process itself

# BPF and what a filter reads and answers: seccomp(2), linux/filter.h, linux/seccomp.h, linux/audit.h.
LOAD, EQUAL, ANY, ANSWER = 0x20, 0x15, 0x45, 0x06
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
NUMBER, MACHINE, ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # as audit has it; column of CALLS
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2

# All that computing and reading need; nothing writes. None: the machine has no such call.
CALLS = {
    "read": (0, 63), "pread64": (17, 67), "close": (3, 57), "lseek": (8, 62), "openat": (257, 56),
    "fstat": (5, 80), "newfstatat": (262, 79), "statx": (332, 291), "stat": (4, None), "lstat": (6, None),
    "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439), "getcwd": (79, 17),
    "readlink": (89, None), "readlinkat": (267, 78), "getdents64": (217, 61), "fcntl": (72, 25),
    "mmap": (9, 222), "munmap": (11, 215), "mremap": (25, 216), "mprotect": (10, 226), "brk": (12, 214),
    "madvise": (28, 233), "futex": (202, 98), "sched_yield": (24, 124), "restart_syscall": (219, 128),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "gettimeofday": (96, 169), "getrandom": (318, 278), "uname": (63, 160),
    "getpid": (39, 172), "gettid": (186, 178), "getuid": (102, 174), "geteuid": (107, 175),
    "getgid": (104, 176), "getegid": (108, 177), "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip
READING = os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NONBLOCK
# Of these calls one argument, counted from 0, may have no other bits: fcntl duplicates, and reads flags.
BITS = {"openat": (2, READING), "fcntl": (1, 0b11)}

COMPUTES = frozenset(
    "import compile exec marshal.loads marshal.load os.listdir os.scandir builtins.id object.__getattr__ "
    "object.__setattr__ object.__delattr__ code.__new__ function.__new__ pickle.find_class sys._getframe "
    "sys._getframemodulename sys.settrace array.__new__ sys.excepthook sys.unraisablehook pdb.Pdb".split()
)  # audit events


def bpf(machine: str) -> list[tuple[int, int, int, int]]:
    """Return the filter of a row of MACHINES in struct sock_filter: code, jumps if true and if not, k."""
    audit, column = MACHINES[machine]
    lines = [(LOAD, 0, 0, MACHINE), (EQUAL, 1, 0, audit), (ANSWER, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]
    for name, numbers in CALLS.items():
        if numbers[column] is None:
            continue
        checked = []
        if name in BITS:
            argument, bits = BITS[name]
            checked = [(LOAD, 0, 0, ARGUMENTS + 8 * argument), (ANY, 0, 1, 2**32 - 1 & ~bits)]
            checked += [(ANSWER, 0, 0, REFUSE)]
        lines += [(EQUAL, 0, len(checked) + 1, numbers[column]), *checked, (ANSWER, 0, 0, ALLOW)]
    return [*lines, (ANSWER, 0, 0, REFUSE)]


def let_the_kernel_refuse() -> bool:
    """Let this process make no system calls but CALLS, for good; return whether that could be had."""
    if sys.platform != "linux" or platform.machine() not in MACHINES:
        return False
    import ctypes

    prctl = ctypes.CDLL(None).prctl
    prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    lines = bpf(platform.machine())
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    program = ctypes.create_string_buffer(struct.pack("HP", len(lines), ctypes.addressof(code)))
    for name in [name for name in sys.modules if name.partition(".")[0] in ("ctypes", "_ctypes")]:
        del sys.modules[name]
    return not (
        prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        or prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(program), 0, 0)
    )


def let_python_refuse() -> None:
    """Let Python raise PermissionError for all but computing and reading below sys.path."""
    below = tuple(os.path.join(path, "") for path in sys.path if path)

    # Defaults are out of the reach of code that patches modules, builtins or frames.
    def guard(event, arguments, below=below, computes=COMPUTES, kind=type, text=str, error=PermissionError,
              writing=~READING):  # fmt: skip
        if event == "open":
            path, _, flags = arguments
            if kind(path) is text and path.startswith(below) and "/.." not in path and not flags & writing:
                return
        elif event in computes:
            return
        raise error("not allowed here: " + event)

    sys.addaudithook(guard)


def set_limits(seconds: int, memory: int) -> None:
    """Limit processor time and address space, and let no file grow and no process begin."""
    limits = {"CPU": seconds, "AS": memory, "FSIZE": 0, "NPROC": 0, "CORE": 0, "NOFILE": 16}
    for kind, limit in limits.items():
        resource.setrlimit(getattr(resource, "RLIMIT_" + kind), (limit, limit))


def main() -> int:
    """Return the exit code."""
    import doctest  # takes long, and fastformer imports this file for what it says above

    source, tests, seconds, memory = json.load(sys.stdin)
    os.close(0)
    sys.stdin, sys.stdout, sys.stderr = io.StringIO(), io.StringIO(), io.StringIO()
    set_limits(seconds, memory)
    if not let_the_kernel_refuse():
        return UNWALLED
    let_python_refuse()
    module = sys.modules["candidate"] = types.ModuleType("candidate")
    exec(compile(source, "<candidate>", "exec", dont_inherit=True), vars(module))
    test = doctest.DocTestParser().get_doctest(tests, vars(module), "candidate", None, 0)
    found = doctest.DocTestRunner(verbose=False).run(test, out=lambda text: None)
    return PASSED if found.attempted and not found.failed else FAILED


if __name__ == "__main__":
    code = FAILED
    try:
        code = main()
    finally:
        os._exit(code)  # nothing that the code left to be done at the end is done
