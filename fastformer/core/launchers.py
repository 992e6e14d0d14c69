"""``--launcher``: who starts the processes of a run, watches them, and starts them again when one dies.

Nothing here imports JAX: what watches a run holds none of its devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from fastformer.core.config import section, set_key
from fastformer.core.distributed import ALONE, DistributedConfig
from fastformer.core.errors import UserError
from fastformer.core.slurm import submit, submit_all
from fastformer.core.supervisor import supervise

LAUNCHERS: dict[str, Callable[[Sequence[str], DistributedConfig, Path], int]] = {
    "local": supervise,
    "slurm": submit,
}
FLAG = "--launcher"
Runs = Sequence[tuple[Sequence[str], Path]]  # command and workdir of each


def launch(name: str, command: Sequence[str], config: ConfigDict, workdir: Path) -> int:
    """Run ``command`` without its ``--launcher`` as config.distributed says; return the exit code.

    Raises:
      UserError: a field of config.distributed cannot be.
    """
    words = iter(command)
    kept = [word for word in words if not (_is_flag(word) and (word != FLAG or next(words)))]
    return LAUNCHERS[name](kept, section(DistributedConfig, config, "distributed"), workdir)


def side_by_side(
    name: str, overrides: Sequence[tuple[str, str]]
) -> Callable[[Runs, Sequence[int]], Iterator[tuple[int, int]]]:
    """Return what starts many runs at once: ``(runs, signals that came) -> (index, exit code)`` as they end.

    Args:
      overrides: of config.distributed alone, the same for all runs.

    Raises:
      UserError: a launcher that cannot, or a field that cannot be.
    """
    if name != "slurm":
        raise UserError(f"--launcher: {name} goes with --config; --experiment goes with slurm, or without")
    config = ConfigDict({"distributed": ALONE})
    for key, value in overrides:
        set_key(config, key, value)
    options = section(DistributedConfig, config, "distributed")
    return lambda runs, asked: submit_all(runs, options, asked)


def _is_flag(word: str) -> bool:
    return word.partition("=")[0] == FLAG
