"""Run a model's code where it can do no harm: a process of its own with little time, memory and no rights.

Three walls stand one behind the other: limits of the operating system (time, memory, processes, bytes
written), an empty folder and environment, and an audit hook that refuses all that is not computing:
opening files but Python's own to read, sockets, processes, foreign code. A wall can be
climbed by who means to; a model that was trained to complete functions does not.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile

SECONDS, MEMORY = 5, 512 * 2**20  # of the processor; bytes of address space
PASSED = 77  # the child's exit code; 0 would be that of code which ends the process itself

# What the child does with the code on its stdin, once it can do nothing else.
CHILD = r"""
import ast, doctest, io, os, resource, sys
source = sys.stdin.read()
passed, seconds, memory = map(int, sys.argv[1:])
home = tuple(os.path.join(os.path.realpath(path), "") for path in sys.path if path)
limits = {"CPU": seconds, "AS": memory, "FSIZE": 0, "NPROC": 0, "CORE": 0, "NOFILE": 16}
for kind, limit in limits.items():
    resource.setrlimit(getattr(resource, "RLIMIT_" + kind), (limit, limit))
computes = {
    "import", "compile", "exec", "marshal.loads", "marshal.load", "os.listdir", "os.scandir", "builtins.id",
    "object.__getattr__", "object.__setattr__", "object.__delattr__", "sys._getframe", "sys.settrace",
    "array.__new__", "sys.excepthook", "sys.unraisablehook", "pdb.Pdb",
}
def guard(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        reads = (mode is None or not set(mode) & set("wax+")) and not (flags or 0) & 3
        if reads and isinstance(path, str) and os.path.realpath(path).startswith(home):
            return
    elif event in computes:
        return
    raise PermissionError("not allowed here: " + event)
sys.addaudithook(guard)
space = {"__name__": "candidate"}
out, sys.stdout = sys.stdout, io.StringIO()
exec(compile(source, "<candidate>", "exec"), space)
name = [node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)][-1]
runner = doctest.DocTestRunner(verbose=False)
test = doctest.DocTestParser().get_doctest(space[name].__doc__ or "", space, name, None, 0)
runner.run(test, out=lambda text: None)
sys.exit(passed if runner.tries and not runner.failures else 1)
"""


def passes(source: str, seconds: int = SECONDS, memory: int = MEMORY) -> bool:
    """Return whether the doctests of the last function of ``source`` all pass, of which there must be one.

    Args:
      seconds: of processor time, and a little more by the clock.
      memory: bytes of address space.
    """
    command = [sys.executable, "-I", "-c", CHILD, *map(str, (PASSED, seconds, memory))]
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                command,
                input=source.encode("utf-8", "replace"),
                capture_output=True,
                timeout=2 * seconds + 10,
                cwd=folder,
                env={},
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == PASSED
