"""Which signals ask a process to save and end, and how one ends that has nothing to save."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any

ENDING = (signal.SIGTERM, signal.SIGINT)
ENDED = "stopped; the same command starts again"
SOON = 0.05  # seconds, in which what swallowed an exception is over


class Ended(KeyboardInterrupt):
    """A signal ends what may end at once; no Exception, so that nothing on the way swallows it."""


def asking() -> tuple[int, ...]:
    """Return SIGTERM, SIGINT, and SIGHUP (the terminal was closed) where it is not ignored, as nohup does."""
    left_alone = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return (*ENDING, *(() if left_alone else (signal.SIGHUP,)))


def end_process() -> None:
    """Let a signal end the process where it stands: during imports, an exception may end it by a fault."""
    for number in asking():
        signal.signal(number, _end)


def end_program() -> None:
    """Let a signal raise Ended, and again if a destructor or a collector's callback swallows it."""
    for number in asking():
        signal.signal(number, _raise)
    signal.signal(signal.SIGALRM, lambda number, frame: signal.getsignal(signal.SIGTERM)(number, frame))
    sys.unraisablehook = _again


def leave(code: int) -> None:
    """End this process without waiting for others of its run, or for what its threads compile."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            pass  # nobody reads it any more
    os._exit(code)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, f"{ENDED}\n".encode())
    os._exit(0)


def _raise(number: int, frame: FrameType | None) -> None:
    raise Ended(ENDED)


def _again(unraisable: Any) -> None:
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        signal.setitimer(signal.ITIMER_REAL, SOON)
    else:
        sys.__unraisablehook__(unraisable)
