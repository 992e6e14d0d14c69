"""Many processes: the section config.distributed, and how each of them joins the others."""

from __future__ import annotations

from dataclasses import dataclass

import jax
from ml_collections import ConfigDict

from fastformer.core.config import section
from fastformer.core.errors import UserError, require

ALONE = {"coordinator": "", "processes": 1, "index": 0}


@dataclass(frozen=True)
class DistributedConfig:
    """How processes find each other; configs/base.py says what each field means."""

    coordinator: str
    processes: int
    index: int

    def __post_init__(self) -> None:
        require(self.processes >= 1, "processes", self.processes, "1 or more")
        good = 0 <= self.index < self.processes
        require(good, "index", self.index, f"from 0 to {self.processes - 1}, another in each process")
        named = self.coordinator in ("", "auto") or self.coordinator.rpartition(":")[2].isdigit()
        require(named, "coordinator", self.coordinator, "host:port, auto, or empty")
        if self.processes > 1:
            require(bool(self.coordinator), "coordinator", self.coordinator, "host:port of process 0")


def join(config: ConfigDict) -> None:
    """Join the other processes, if there are to be any; before anything else asks JAX for devices.

    It then sets the section to that of a process alone: all of them have the same configuration, and
    a run may go on with another number of processes.

    Raises:
      UserError: a field cannot be, or no cluster is found.
    """
    options = section(DistributedConfig, config, "distributed")
    if options.coordinator == "auto":
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise UserError(
                f"config.distributed.coordinator: auto finds no cluster ({error}); give host:port"
            ) from error
    elif options.coordinator:
        jax.distributed.initialize(options.coordinator, options.processes, options.index)
    config.distributed.update(ALONE)
