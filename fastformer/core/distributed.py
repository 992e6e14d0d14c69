"""Many processes: the section config.distributed, and how each of them joins and leaves the others."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from fastformer.core import signals
from fastformer.core.config import section
from fastformer.core.errors import UserError, require

ALONE = {"coordinator": "", "processes": 1, "index": 0, "restarts": 3, "slurm": ()}
HEARTBEAT = 45  # seconds of silence after which JAX ends all processes, whoever watches them


@dataclass(frozen=True)
class DistributedConfig:
    """How processes find each other; configs/base.py says what each field means."""

    coordinator: str
    processes: int
    index: int
    restarts: int
    slurm: tuple[str, ...]

    def __post_init__(self) -> None:
        require(self.processes >= 1, "processes", self.processes, "1 or more")
        require(self.restarts >= 0, "restarts", self.restarts, "0 or more")
        good = 0 <= self.index < self.processes
        require(good, "index", self.index, f"from 0 to {self.processes - 1}, another in each process")
        port = self.coordinator.rpartition(":")[2]
        named = self.coordinator in ("", "auto") or bool(re.fullmatch(r"\d{1,5}", port)) and int(port) < 2**16
        require(named, "coordinator", self.coordinator, "host:port, auto, or empty")
        for setting in self.slurm:
            require(setting.partition("=")[2] != "", "slurm", setting, "KEY=VALUE, as timeout_min=600")


def join(config: ConfigDict) -> None:
    """Join the other processes, if there are to be any; before anything else asks JAX for devices.

    It then sets the section to that of a process alone: all of them have the same configuration, and
    a run may go on with another number of processes.

    Raises:
      UserError: a field cannot be, or no cluster is found.
    """
    import jax  # here: those that only start processes need none of it

    options = section(DistributedConfig, config, "distributed")
    if options.processes > 1:
        allowed = "host:port of process 0 (or --launcher=local, which starts all of them)"
        require(bool(options.coordinator), "config.distributed.coordinator", options.coordinator, allowed)
    if options.coordinator == "auto":
        try:
            jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT)
        except ValueError as error:
            raise UserError(
                f"config.distributed.coordinator: auto finds no cluster ({error}); give host:port"
            ) from error
    elif options.coordinator:
        where = options.coordinator, options.processes, options.index
        jax.distributed.initialize(*where, heartbeat_timeout_seconds=HEARTBEAT)
    if options.coordinator:
        sys.excepthook = _leave_with_traceback
    config.distributed.update(ALONE)


def leave(code: int) -> None:
    """End this process with ``code``; where others of its run go on, without waiting for them.

    An orderly end of JAX waits minutes for the others, which wait for this one in a collective.
    """
    if code and "jax" in sys.modules:
        import jax

        if jax.distributed.is_initialized():
            signals.leave(code)
    sys.exit(code)


def _leave_with_traceback(*error: Any) -> None:
    sys.__excepthook__(*error)
    leave(1)
