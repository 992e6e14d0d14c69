"""Memory in large pages, for programs on CPUs whose arrays come and go at every step."""

from __future__ import annotations

import os
import sys

TUNABLE = "glibc.malloc.hugetlb"


def start_again() -> None:
    """Put this program in its own place, once, with a malloc that asks Linux for large pages.

    The arrays of a step are larger than what malloc keeps for the next, so that each of their pages is a
    fault again: a fifth of a step's time in pages of 4 kB. glibc reads the wish (malloc's hugetlb of its
    manual's tunables, 2.35 or later) as a process starts and at no other time. Whoever has set it is obeyed.
    """
    given = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform == "linux" and sys.executable and TUNABLE not in given:
        os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [given, f"{TUNABLE}=1"]))
        os.execv(sys.executable, sys.orig_argv)
