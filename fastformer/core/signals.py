"""Which signals ask a process to save and end."""

import signal

ENDING = (signal.SIGTERM, signal.SIGINT)


def asking() -> tuple[int, ...]:
    """Return SIGTERM, SIGINT, and SIGHUP (the terminal was closed) where it is not ignored, as nohup does."""
    left_alone = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return (*ENDING, *(() if left_alone else (signal.SIGHUP,)))
