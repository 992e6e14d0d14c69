"""``--launcher=local``: a run as several processes on this machine, all started again when one dies.

JAX aborts every process of a run when one of them is gone, and no process can catch that: what
starts them again has to stand outside, and to hold no devices.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from fastformer.core.distributed import DistributedConfig
from fastformer.core.errors import UserError, require
from fastformer.core.signals import asking

LOGS = "logs"  # in a run's workdir: what each process wrote to stderr
TICK = 0.2  # seconds between looks
LINGER = 60.0  # seconds that others may go on after the first has ended well
DONE, FAILED, USER_MISTAKE = 0, 1, 2


def supervise(command: Sequence[str], options: DistributedConfig, workdir: Path) -> int:
    """Run ``command`` as ``options.processes`` processes to their end; return the exit code.

    When one dies the others are ended, and all are started again: the command itself goes on from
    its last checkpoint. That happens ``options.restarts`` times without a new checkpoint between.
    The user's mistake (exit code 2) is not tried again. SIGTERM and SIGINT go on to all processes,
    which save first.

    Raises:
      UserError: fields that do not go with it, or a workdir that cannot be written.
    """
    allowed = "empty: --launcher=local chooses it"
    require(not options.coordinator, "config.distributed.coordinator", options.coordinator, allowed)
    try:
        (workdir / LOGS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir: {workdir} cannot be written: {error.strerror}") from error
    ranks = Ranks(command, options.processes, workdir / LOGS)
    left, reached = options.restarts, newest(workdir)
    with passing_on(ranks.signal, asking()) as asked:
        while True:
            code, what = ranks.run(asked)
            if what and asked:
                tell(what)
            if code in (DONE, USER_MISTAKE) or asked:
                return code
            if newest(workdir) > reached:
                left, reached = options.restarts, newest(workdir)
            if not left:
                tell(f"{what}; {options.restarts} restarts since then reached no new checkpoint: giving up")
                return FAILED
            left -= 1
            origin = f"step {reached}" if reached >= 0 else "the start"
            tell(f"{what}; starting all {options.processes} again from {origin} ({left} restarts left)")


class Ranks:
    """The processes of a run, each of which has a process group and a file for its stderr of its own."""

    def __init__(self, command: Sequence[str], number: int, logs: Path):
        self._command, self._number, self._logs = list(command), number, logs
        self._processes: list[subprocess.Popen] = []

    def run(self, asked: Sequence[int]) -> tuple[int, str]:
        """Start all and wait until they have ended; return the exit code and who failed in what way.

        Args:
          asked: the signals that came so far, to which more are added while it waits.
        """
        shown = self._start()
        try:
            if asked:  # the signal came while they started
                self.signal(asked[-1])
            return self._watch(shown, asked)
        finally:
            self.signal(signal.SIGKILL)
            for process in self._processes:
                process.wait()
            shown.close()

    def signal(self, number: int) -> None:
        """Send a signal to all that have not ended."""
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def _start(self) -> BinaryIO:
        """Start all; return what the first writes to stderr."""
        common = [f"--config.distributed.processes={self._number}"]
        if self._number > 1:
            common.append(f"--config.distributed.coordinator=127.0.0.1:{free_port()}")
        self._processes = []
        shown = self._log(0).open("ab+")
        shown.seek(0, os.SEEK_END)
        for index in range(self._number):
            with self._log(index).open("ab") as log:
                self._processes.append(
                    subprocess.Popen(
                        [*self._command, *common, f"--config.distributed.index={index}"],
                        env=os.environ | devices_of(index, self._number),
                        stdout=None if index == 0 else log,  # the first speaks for all
                        stderr=log,
                        process_group=0,
                    )
                )
        return shown

    def _watch(self, shown: BinaryIO, asked: Sequence[int]) -> tuple[int, str]:
        first_end = None
        while True:
            held = shown.read()  # shown a moment later, unless it is what a process says as it dies
            time.sleep(TICK)
            codes = [process.poll() for process in self._processes]
            # A signal may end a process that has not begun to listen yet.
            failed = [index for index, code in enumerate(codes) if code and -code not in asked]
            if failed:
                # The others fail within moments, for the want of it; what was killed is the cause.
                index = min(failed, key=lambda i: (codes[i] != USER_MISTAKE, codes[i] > 0, i))
                return self._failed(index, codes[index])
            _show(held)
            if None not in codes:
                _show(shown.read())
                return DONE, ""
            first_end = first_end or (time.monotonic() if any(code is not None for code in codes) else None)
            if first_end and time.monotonic() - first_end > LINGER:
                what = f"process {codes.index(None)} goes on {LINGER:.0f} s after another has ended"
                return (DONE if asked else FAILED), what

    def _failed(self, index: int, code: int) -> tuple[int, str]:
        lines = self._log(index).read_text(errors="replace").strip().splitlines()
        if code == USER_MISTAKE:
            print(lines[-1] if lines else "", file=sys.stderr, flush=True)
            return USER_MISTAKE, ""
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        last = f", at last: {lines[-1][:200]}" if code > 0 and lines else ""
        return FAILED, f"process {index} of {self._number} {how} ({self._log(index)}{last})"

    def _log(self, index: int) -> Path:
        return self._logs / f"process-{index}.txt"


@contextlib.contextmanager
def passing_on(send: Callable[[int], None], numbers: Sequence[int]) -> Iterator[list[int]]:
    """Within it, these signals go to ``send``; yield the list of those that came."""
    asked: list[int] = []

    def forward(number: int, frame: object) -> None:
        asked.append(number)
        send(number)

    handlers = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def newest(workdir: Path) -> int:
    """Return the step of the newest checkpoint in a workdir, -1 where there is none."""
    return max((int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit()), default=-1)


def devices_of(index: int, number: int) -> dict[str, str]:
    """Return the environment in which process ``index`` of ``number`` sees its share of the GPUs here."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    gpus = listed.split(",") if listed else [str(gpu) for gpu in range(count)]
    share = len(gpus) // number
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[index * share : (index + 1) * share])} if share else {}


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _show(text: bytes) -> None:
    sys.stderr.write(text.decode(errors="replace"))
    sys.stderr.flush()


def tell(text: str) -> None:
    """Print a line about the processes."""
    print(f"launcher: {text}", file=sys.stderr, flush=True)
