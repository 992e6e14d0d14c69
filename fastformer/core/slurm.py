"""``--launcher=slurm``: a run as a job of a Slurm cluster, by submitit; arms of an experiment side by side.

Jobs are described by config.distributed.slurm, settings of submitit: ``nodes=2``, ``timeout_min=600``,
``slurm_partition=gpu``, ``gpus_per_node=8``; ``cluster=local`` runs them on this machine, to try it out.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastformer.core.config import literal
from fastformer.core.distributed import DistributedConfig
from fastformer.core.errors import UserError, require
from fastformer.core.signals import ENDING
from fastformer.core.supervisor import DONE, FAILED, USER_MISTAKE, newest, passing_on, tell

FOLDER = "slurm"  # in a run's workdir: what submitit writes, and each process's output
TIMEOUTS = 1000  # times that a job may reach its time limit and go on
ROOT = Path(__file__).resolve().parents[2]
PAUSE = 1.0  # seconds between looks; submitit itself asks Slurm once a minute


def submit(command: Sequence[str], options: DistributedConfig, workdir: Path) -> int:
    """Run ``command`` as a job of ``options.processes`` tasks, and wait for its end; return the exit code.

    A job that fails is submitted again, and goes on from its last checkpoint, ``options.restarts``
    times without a new checkpoint between. One that comes near its time limit saves and is queued
    again by submitit, whether or not this process still waits: a closed terminal leaves the job alone.
    SIGTERM and SIGINT cancel it, and its processes save first.

    Raises:
      UserError: submitit is not installed, or does not take a setting.
    """
    with passing_on(lambda number: None, ENDING) as asked:
        return next(submit_all([(command, workdir)], options, asked))[1]


def submit_all(
    runs: Sequence[tuple[Sequence[str], Path]], options: DistributedConfig, asked: Sequence[int]
) -> Iterator[tuple[int, int]]:
    """Submit each ``(command, workdir)`` as a job of its own; yield ``(index, exit code)`` as they end.

    Args:
      asked: signals that came; with the first, which may come any time, the jobs are cancelled.

    Raises:
      UserError: as ``submit`` does.
    """
    jobs, cancelled = {index: Job(*run, options) for index, run in enumerate(runs)}, False
    while jobs:
        if asked and not cancelled:
            cancelled = True
            for job in jobs.values():
                job.cancel()
        for index, job in list(jobs.items()):
            code = job.poll(cancelled)
            if code is not None:
                del jobs[index]
                yield index, code
        time.sleep(PAUSE if jobs else 0)


class Job:
    """A run on the cluster, submitted again when it fails."""

    def __init__(self, command: Sequence[str], workdir: Path, options: DistributedConfig):
        self._task, self._workdir, self._options = Task(list(command)), workdir, options
        self._left, self._reached = options.restarts, newest(workdir)
        self._executor = _executor(workdir, options)
        self._submit()

    def _submit(self) -> None:
        self._job = self._executor.submit(self._task)
        tell(f"job {self._job.job_id} for {self._workdir}, which writes to {self._job.paths.stdout}")

    def cancel(self) -> None:
        """End the job; its processes save first."""
        self._job.cancel(check=False)

    def poll(self, cancelled: bool) -> int | None:
        """Return the exit code, or None while the job waits or runs."""
        if not self._job.done():
            return None
        if cancelled:
            return DONE
        codes, what = self._outcome()
        if USER_MISTAKE in codes:
            print(_last_line(self._task_of(codes.index(USER_MISTAKE))), file=sys.stderr, flush=True)
            return USER_MISTAKE
        if FAILED not in codes:
            return DONE
        if newest(self._workdir) > self._reached:
            self._left, self._reached = self._options.restarts, newest(self._workdir)
        if not self._left:
            tell(f"job {self._job.job_id} failed ({what}): giving up")
            return FAILED
        self._left -= 1
        tell(f"job {self._job.job_id} failed ({what}); submitting it again ({self._left} restarts left)")
        self._submit()
        return None

    def _task_of(self, index: int) -> Any:
        return self._job.task(index) if self._job.num_tasks > 1 else self._job

    def _outcome(self) -> tuple[list[int], str]:
        """Return each task's exit code, and how one of them failed."""
        codes, what = [], ""
        for index in range(self._job.num_tasks):
            try:
                codes.append(self._task_of(index).result())
            except Exception as error:  # what submitit raises for a job that left no result, or failed
                found = re.findall(r"^RuntimeError: (.*)", str(error), re.MULTILINE)
                codes.append(FAILED)
                what = what or (found or [type(error).__name__])[-1]
        return codes, what


def _last_line(task: Any) -> str:
    lines = (task.stderr() or "").strip().splitlines()
    return next((line for line in reversed(lines) if line.startswith("launch.py: ")), "")


class Task:
    """One process of a job: it starts the command as a process and waits for it."""

    def __init__(self, command: list[str]):
        self.command = command
        self._process: subprocess.Popen | None = None

    def __call__(self) -> int:
        """Return the exit code, 0 or 2.

        Raises:
          RuntimeError: any other, which ends the job.
        """
        import submitit

        where = submitit.JobEnvironment()
        self._process = subprocess.Popen([*self.command, *_place(where)])
        for number in ENDING:
            signal.signal(number, lambda number, frame: self._process.send_signal(number))
        self._wait()
        code = self._process.wait()
        if code not in (DONE, USER_MISTAKE):
            raise RuntimeError(f"process {where.global_rank} ended with exit code {code}")
        return code

    def checkpoint(self) -> Any:
        """Save and end before the time is over; submitit calls it and queues what it returns."""
        import submitit

        self._process.send_signal(signal.SIGTERM)  # all processes save when one is asked to
        self._wait()
        return submitit.helpers.DelayedSubmission(Task(self.command))

    def _wait(self) -> None:
        # A signal may come while Popen.wait holds its lock, and then it cannot be called again.
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)


def _place(where: Any) -> list[str]:
    """Return the flags of a task's place among all."""
    if where.num_tasks == 1:
        return ["--config.distributed.processes=1"]
    flags = [f"--config.distributed.processes={where.num_tasks}"]
    flags.append(f"--config.distributed.index={where.global_rank}")
    if "SLURM_PROCID" in os.environ:  # JAX knows Slurm, and which GPUs a task is to have
        return [*flags, "--config.distributed.coordinator=auto"]
    port = int(where.raw_job_id) % 2**12 + (65535 - 2**12 + 1)  # the same in all tasks
    return [*flags, f"--config.distributed.coordinator={where.hostnames[0]}:{port}"]


def _executor(workdir: Path, options: DistributedConfig) -> Any:
    # Or it would replace the log handlers of the whole process.
    os.environ.setdefault("SUBMITIT_LOG_LEVEL", "NOCONFIG")
    try:
        import submitit
    except ImportError as error:
        raise UserError("--launcher: slurm needs submitit (pip install submitit)") from error
    settings = {key: literal(value) for key, _, value in (text.partition("=") for text in options.slurm)}
    cluster, nodes = settings.pop("cluster", "slurm"), settings.setdefault("nodes", 1)
    require(isinstance(nodes, int), "config.distributed.slurm", f"nodes={nodes}", "nodes=NUMBER")
    allowed = f"a multiple of the {nodes} nodes of config.distributed.slurm"
    require(options.processes % nodes == 0, "config.distributed.processes", options.processes, allowed)
    settings |= {"tasks_per_node": options.processes // nodes, "name": workdir.name}
    # Or the others would wait for one that died.
    settings.setdefault("slurm_srun_args", ["--kill-on-bad-exit=1"])
    # submitit's own process finds this package by it.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        executor = submitit.AutoExecutor(workdir / FOLDER, cluster=cluster, slurm_max_num_timeout=TIMEOUTS)
        executor.update_parameters(**settings)
    except (AssertionError, NameError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"config.distributed.slurm: {' '.join(str(error).split())[:200]}") from error
    return executor
