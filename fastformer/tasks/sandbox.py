"""Run a model's code where it can do no harm: a process of its own with little time, memory and no rights.

Walls stand one behind the other (sandboxed.py builds them). The kernel's is a seccomp filter, seccomp(2):
the process may compute and read, and cannot write, start, signal or connect to anything, nor lift the
filter. Before it, an audit hook limits what is read to what lies below sys.path; that wall can be climbed
by who means to. Limits of the operating system bound time and memory. All that the process is left with to
tell of itself is its exit code.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from fastformer.core.errors import FieldError
from fastformer.tasks.sandboxed import MACHINES, PASSED

PROGRAM = Path(__file__).with_name("sandboxed.py")
SECONDS, MEMORY = 5, 512 * 2**20  # of the processor; bytes of address space
GRACE = 10  # seconds by the clock beside twice those of the processor


def passes(module: str, tests: str, seconds: int = SECONDS, memory: int = MEMORY) -> bool:
    """Return whether the doctests of a docstring, of which there must be one, pass in a module.

    Args:
      module: its source.
      tests: the docstring; its names are the module's.
      seconds: of processor time, and a little more by the clock.
      memory: bytes of address space.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            [sys.executable, "-I", PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        ) as process,
    ):
        try:
            process.communicate(
                json.dumps([module, tests, seconds, memory]).encode(), timeout=2 * seconds + GRACE
            )
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode == PASSED


def check() -> None:
    """Check that code can be run here behind all walls.

    Raises:
      FieldError: it cannot.
    """
    if not passes("", ">>> 1 + 1\n2"):
        raise FieldError(
            "config.task.run_doctests",
            f"True is not allowed on this system ({platform.system()} on {platform.machine()}): a model's "
            f"code is run behind a seccomp filter alone, which Linux has on {' and '.join(MACHINES)} where "
            "prctl may set one; it must be False here",
        )
