"""A model's code can do no harm: what each wall stops, and that without walls it would be done."""

from __future__ import annotations

import errno
import os
import select
import subprocess

import pytest

from fastformer.core.errors import UserError
from fastformer.tasks import sandbox, sandboxed
from fastformer.tasks.code import Code
from fastformer.tasks.sandbox import passes

PROGRAM = sandbox.PROGRAM
KERNEL = " not let_the_kernel_refuse()", " False"
PYTHON = "    let_python_refuse()\n", ""
LIMITS = "    set_limits(seconds, memory)\n", ""
NO_FILTER = "= 38, 22, 2", "= 38, 22, 99"


def change(monkeypatch, tmp_path, *changes):
    """Run code by a program that is the project's but for some of its text, such as the call of a wall."""
    text = PROGRAM.read_text()
    for old, new in changes:
        assert text.count(old) == 1
        text = text.replace(old, new)
    program = tmp_path / "program.py"
    program.write_text(text)
    monkeypatch.setattr(sandbox, "PROGRAM", program)


def tried(line, **limits):
    """Return whether a line of code runs to its end in the body of a function that is tested."""
    body = "".join(f"    {part}\n" for part in line.splitlines())
    return passes(f"def f(x):\n{body}    return 2 * x\n", ">>> f(2)\n4", **limits)


def test_doctests_pass_or_fail():
    assert tried("pass")
    assert not any(map(tried, ("return x", "return (", "raise SystemExit", "raise SystemExit(77)")))
    assert not passes("", "no test") and not passes("raise SystemExit(77)", ">>> 1\n1")
    assert not passes("", ">>> 1\n1\n>>> 2\n3") and not passes("", ">>>1")
    assert not passes("\ud800", ">>> 1\n1")
    assert passes("def f(x: int): pass", ">>> f.__annotations__\n{'x': <class 'int'>}")


@pytest.mark.parametrize(
    "names",
    [
        "math, re, collections, dataclasses, functools, itertools, textwrap, string, operator, types, typing",
        "json, random, statistics, decimal, fractions, datetime, time, enum, heapq, bisect, copy, struct",
        "inspect, unittest, pathlib, hashlib, pickle, asyncio, logging, csv, tempfile, email, urllib.parse",
    ],
)
def test_what_only_computes_passes(names):
    assert tried(f"import {names}")
    assert passes(
        "import dataclasses, collections, enum, typing\n@dataclasses.dataclass\nclass A:\n    x: int = 1\n"
        "B = collections.namedtuple('B', 'x')\nclass C(enum.Enum):\n    x = 1\n"
        "class D(typing.NamedTuple):\n    x: int",
        ">>> A(), B(1), C.x, D(2)\n(A(x=1), B(x=1), <C.x: 1>, D(x=2))",
    )


# What writes, starts, signals or connects: {path} is new, {victim} a file, {folder} where both are.
HARM = [
    "open({path!r}, 'w').close()",
    "os.open({path!r}, os.O_RDONLY | os.O_CREAT)",
    "os.open({folder!r}, os.O_RDWR | os.O_TMPFILE)",
    "os.open({victim!r}, os.O_RDONLY | os.O_TRUNC)",
    "os.open({victim!r}, os.O_WRONLY | os.O_APPEND)",
    "os.remove({victim!r})",
    "os.truncate({victim!r}, 0)",
    "os.chmod({victim!r}, 0o600)",
    "os.utime({victim!r}, (0, 0))",
    "os.rename({victim!r}, {path!r})",
    "os.link({victim!r}, {path!r})",
    "os.symlink({victim!r}, {path!r})",
    "os.mkdir({path!r})",
    "os.mkfifo({path!r})",
    "import shutil\nshutil.rmtree({folder!r})",
    "assert not os.system('touch {path}')",
    # subprocess tells the hook in Python; what it calls then, _posixsubprocess.fork_exec, does not.
    "import subprocess\nsys.audit = lambda *_: None\nsubprocess.run(['touch', {path!r}], check=True)",
    "os.fork() or os._exit(0)",
    "import threading\nthread = threading.Thread(target=int)\nthread.start()\nthread.join()",
    "os.kill({pid}, 9)",
    "import signal\nsignal.pidfd_send_signal(os.pidfd_open({pid}), 9)",
    "import fcntl\nfcntl.fcntl(os.open({victim!r}, os.O_RDONLY), fcntl.F_SETOWN, {pid})",
    "import fcntl\nfcntl.fcntl(os.open({victim!r}, os.O_RDONLY), fcntl.F_SETLEASE, fcntl.F_RDLCK)",
    "import socket\nsocket.socket()",
    "os.memfd_create('x')",
    "os.write(1, b'x')",
    "import resource\nresource.setrlimit(resource.RLIMIT_CORE, (0, 0))",
    "import ctypes\nassert not ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)",
    "import ctypes\nassert ctypes.CDLL(None).syscall(ctypes.c_long({clone}), 17, 0, 0, 0, 0) >= 0",
]
CLONE = {"x86_64": 56, "aarch64": 220}[os.uname().machine]


@pytest.fixture
def place(tmp_path):
    folder = tmp_path / "place"
    folder.mkdir()
    (folder / "victim").write_text("here")
    (folder / "victim").chmod(0o640)
    asleep = subprocess.Popen(["sleep", "600"])
    names = {"path": str(folder / "new"), "victim": str(folder / "victim"), "folder": str(folder)}
    yield names | {"pid": asleep.pid, "clone": CLONE}
    asleep.kill()
    asleep.wait()


def unharmed(place):
    with open(place["victim"]) as file:
        text = file.read()
    found = os.stat(place["victim"])
    whole = text == "here" and found.st_mode & 0o777 == 0o640 and found.st_mtime > 0
    return whole and os.listdir(place["folder"]) == ["victim"] and os.path.exists(f"/proc/{place['pid']}/exe")


@pytest.mark.parametrize("harm", HARM)
def test_the_kernel_alone_stops_harm(harm, place, monkeypatch, tmp_path):
    line = "import os, sys\n" + harm.format(**place)
    assert not tried(line) and unharmed(place)
    change(monkeypatch, tmp_path, PYTHON, LIMITS)
    assert not tried(line) and unharmed(place)
    change(monkeypatch, tmp_path, PYTHON, LIMITS, KERNEL)
    assert tried(line), "it does no harm without walls, so that this test shows nothing"


# What the hook refuses to code that would patch it away; {victim} is no file of Python's own.
CLIMBS = [
    "open({victim!r}).read()",
    "open(os.path.dirname(os.__file__) + '/../../../../../../../..' + {victim!r}).read()",
    "class Name(str):\n    startswith = lambda *_: True\nopen(Name({victim!r})).read()",
    "for name, value in [*vars(__main__).items()]:\n"
    "    if isinstance(value, (set, frozenset)): setattr(__main__, name, value | {{'os.remove'}})\n"
    "    if isinstance(value, set): value.update(['os.remove'])\nos.remove({victim!r})",
    "os.path.realpath = lambda *_: os.__file__\nopen({victim!r}).read()",
    "__main__.READING = -1\nos.open({victim!r}, os.O_RDONLY | os.O_TRUNC)",
    "__main__.READING = -1\nos.open(os.__file__, os.O_RDONLY | os.O_APPEND)",
    "class Name(str):\n    startswith = lambda *_: True\n"
    "builtins.type = lambda *_: str\nopen(Name({victim!r})).read()",
    "sys.path.append({folder!r})\nopen({victim!r}).read()",
    "try: open({victim!r})\nexcept PermissionError as error:\n"
    "    frame = error.__traceback__.tb_next.tb_frame\n    frame.f_locals.update(below='/')\n"
    "open({victim!r}).read()",
    "gc.get_objects()",
]


@pytest.mark.parametrize("climb", CLIMBS)
def test_the_hook_alone_is_not_taken_down(climb, place, monkeypatch, tmp_path):
    line = "import __main__, builtins, gc, os, sys\n" + climb.format(**place)
    assert not tried(line) and unharmed(place)
    change(monkeypatch, tmp_path, KERNEL)
    assert not tried(line) and unharmed(place)
    change(monkeypatch, tmp_path, PYTHON, LIMITS, KERNEL)
    assert tried(line), "it would not be refused without walls, so that this test shows nothing"


def test_reading_below_sys_path_is_let():
    assert tried("import os\nassert open(os.__file__).read() and os.listdir(os.path.dirname(os.__file__))")


def test_nothing_is_inherited_but_a_place_where_all_is_lost():
    line = "import os, stat\nfound = []\nfor n in range(16):\n    try: found.append((n, os.fstat(n)))\n"
    line += "    except OSError: pass\nassert [n for n, _ in found] == [1, 2]\n"
    null = os.stat(os.devnull).st_rdev
    assert tried(line + f"assert all(s.st_rdev == {null} for _, s in found) and not os.environ.get('PATH')")


@pytest.mark.parametrize("waste", ["while True: pass", "[0] * 10**10", "print('x' * 10**9)"])
def test_code_cannot_waste(waste):
    assert not tried(waste, seconds=1)


def test_the_whole_session_ends_with_its_time(monkeypatch, tmp_path):
    """What holds the pipe is a process that the program's process began."""
    pipe, program = tmp_path / "pipe", tmp_path / "program.py"
    os.mkfifo(pipe)
    holds = f"[open({str(pipe)!r}, 'w'), time.sleep(60)]"
    program.write_text(f"import os, time\nos.fork() or {holds}\ntime.sleep(60)\n")
    monkeypatch.setattr(sandbox, "PROGRAM", program)
    monkeypatch.setattr(sandbox, "GRACE", 0)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    assert not passes("", "", seconds=1)
    ended = select.poll()
    ended.register(reader, 0)
    assert [event for _, event in ended.poll(5000)] == [select.POLLHUP]
    os.close(reader)


def answer(machine, audit, number, *arguments):
    """Return what the filter of a machine answers to a system call: BPF, as linux/filter.h has it."""
    words = {sandboxed.NUMBER: number, sandboxed.MACHINE: audit}
    words |= {sandboxed.ARGUMENTS + 8 * n: value for n, value in enumerate(arguments)}
    lines, at, loaded = sandboxed.bpf(machine), 0, 0
    while True:
        code, if_true, if_not, k = lines[at]
        if code == sandboxed.ANSWER:
            return k
        if code == sandboxed.LOAD:
            loaded, at = words[k], at + 1
        else:
            held = loaded == k if code == sandboxed.EQUAL else loaded & k
            at += 1 + (if_true if held else if_not)


@pytest.mark.parametrize("machine", sandboxed.MACHINES)
def test_the_filter_of_every_machine(machine):
    audit, column = sandboxed.MACHINES[machine]
    refused = 0x50000 | errno.EPERM
    for name, numbers in sandboxed.CALLS.items():
        if numbers[column] is not None:
            assert answer(machine, audit, numbers[column], 0, 0, 0) == sandboxed.ALLOW, name
    known = {numbers[column] for numbers in sandboxed.CALLS.values()}
    for number in set(range(1000)) - known:
        assert answer(machine, audit, number) == refused
    opens = sandboxed.CALLS["openat"][column]
    for bit in range(32):
        allowed = 1 << bit & sandboxed.READING
        assert answer(machine, audit, opens, 0, 0, 1 << bit) == (sandboxed.ALLOW if allowed else refused)
    assert answer(machine, audit, 0x40000000 | sandboxed.CALLS["read"][0]) == refused  # x32
    assert answer(machine, audit ^ 0x80000000, 0) == sandboxed.KILL  # another machine's calls


def test_without_the_kernels_wall_a_run_is_refused_before_it_begins(monkeypatch, tmp_path):
    sandbox.check()
    change(monkeypatch, tmp_path, NO_FILTER)
    assert not tried("pass")
    told = r"^config\.task\.run_doctests: True is not allowed.*seccomp.*False here$"
    with pytest.raises(UserError, match=told):
        Code(run_doctests=True).open(None, None, None)
