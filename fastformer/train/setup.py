"""From a configuration and a workdir to what a run is made of."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fastformer import compress, models, tasks
from fastformer.attention import VARIANTS
from fastformer.attention.mixer import able
from fastformer.core import config as configuration
from fastformer.core.config import CONFIG, section
from fastformer.core.errors import UserError, lookup, require
from fastformer.core.mesh import MeshConfig, check_divisible, layout, make_mesh, rules, use
from fastformer.data import DataConfig
from fastformer.data.atomic import atomic
from fastformer.data.pipeline import RECORD
from fastformer.data.tokenisers import FILE as TOKENISER

LOCK = ".lock"
# Keys that say where a run is made and what it leaves behind, not what it comes to: it may go on with others.
FREE = ("mesh.", "sharding.", "distributed.", "log.", "checkpoint.", "data.directory")


@dataclass(frozen=True)
class TrainConfig:
    """How long and on how much at once.

    Attributes:
      steps: optimiser steps of the whole run; 0 only with ``init``.
      batch: B, rows a step over all devices.
      accumulate: parts of the batch that go through the model one after another.
      precision, precision_cycles: which steps are made in which policy (train.precision).
      spike: standard deviations above its average at which a loss is a spike; 0 is off.
      bad_steps: skipped in a row before the run goes back to its last good checkpoint.
      rollbacks: how often it may.
      init: workdir of a run to begin with the weights of; "" is none. init_layers: a row of begin.LAYERS.
    """

    steps: int
    batch: int
    accumulate: int
    precision: tuple[tuple, ...]
    precision_cycles: int
    spike: float
    bad_steps: int
    rollbacks: int
    init: str
    init_layers: str

    def __post_init__(self) -> None:
        for field in ("batch", "accumulate", "bad_steps"):
            require(getattr(self, field) >= 1, field, getattr(self, field), "1 or more")
        least = "0 (what config.train.init holds is compressed as it is)" if self.init else "1"
        require(self.steps >= int(least[0]), "steps", self.steps, f"{least} or more")
        # More is a slip of the hand, which would end as a lack of memory, or beyond the optimiser's count.
        for field, most in (("batch", 2**20), ("steps", 2**31 - 1)):
            require(getattr(self, field) <= most, field, getattr(self, field), f"at most {most:,}")
        lookup(dict.fromkeys(("even", "change")), self.init_layers, "init_layers")
        for field in ("spike", "rollbacks"):
            require(getattr(self, field) >= 0, field, getattr(self, field), "0 or more")
        allowed = f"a number of parts that divides config.train.batch, {self.batch}"
        require(self.batch % self.accumulate == 0, "accumulate", self.accumulate, allowed)


@dataclass(frozen=True, eq=False)
class Run:
    """What training, evaluation and generation share.

    Attributes:
      config: the whole configuration.
      workdir: of the run.
      mesh, rules: devices, and the letters split over them (core.mesh).
      data: the two splits, as data.TextData and data.Examples have them.
      model: the linen module, as the compression methods change it.
      task: what a batch, the loss and the metric are.
      compression: the methods that the run is made smaller by, none or more.
    """

    config: ConfigDict
    workdir: Path
    mesh: Mesh
    rules: tuple[tuple[str, tuple[str, ...]], ...]
    data: Any
    model: nn.Module
    task: tasks.Task
    compression: compress.Compression = compress.Compression()


def build_run(config: ConfigDict, workdir: Path | str, devices: list[jax.Device] | None = None) -> Run:
    """Return the run that ``config`` describes, on ``devices`` (default: all).

    Sections are checked before the text is opened, which may take minutes the first time.

    Raises:
      UserError: a value cannot be, sizes do not split over the devices, or the text is not there.
    """
    configuration.check_sections(config)
    require(0 <= config.seed < 2**63, "config.seed", config.seed, "from 0 to 2**63 - 1")
    section(TrainConfig, config, "train")
    data_config = section(DataConfig, config, "data")
    mesh = make_mesh(section(MeshConfig, config, "mesh"), devices)
    axis_rules = rules(config.sharding)
    task, compression = tasks.build(config), compress.build(config)
    compression.model(models.build(config, 1, data_config.length, task.head))
    workdir = Path(workdir)
    data = task.open(data_config, workdir, config)
    tasks.check_tokens(task, data.tokeniser)
    data.heldout_rows(config.evaluate.overlap)  # refuses an overlap that cannot be before anything is written
    model = models.build(config, data.vocabulary, data_config.length, task.head)
    check_sizes(config, data.vocabulary, mesh, axis_rules)
    return Run(config, workdir, mesh, axis_rules, data, compression.model(model), task, compression)


def check_sizes(config: ConfigDict, vocabulary: int, mesh: Mesh, axis_rules: Any) -> None:
    """Check that batches and weights split evenly over the mesh.

    Raises:
      UserError: they do not.
    """
    model = section(models.ModelConfig, config, "model")
    bpe = config.data.tokeniser == "bpe"
    batch = "train.batch" if config.train.accumulate == 1 else "train.batch / config.train.accumulate"
    sizes = {
        "B": (batch, config.train.batch // config.train.accumulate),
        "T": ("data.length", config.data.length),
        "D": ("model.width", model.width),
        "H": ("model.heads", model.heads),
        "G": ("model.kv_heads" if model.kv_heads else "model.heads", model.kv_heads or model.heads),
        "K": ("model.head_width", model.key_width),
        "P": ("model.head_width", model.key_width),
        "F": ("model.ff_width", model.hidden),
        "V": ("data.vocabulary" if bpe else "sharding.V (the tokens of the vocabulary)", vocabulary),
    }
    check_divisible(sizes, mesh, axis_rules)
    with use(mesh, axis_rules):
        split = layout("BT", (config.train.batch, config.data.length))[1]
    for name in (*model.variants, *(model.encoder_pattern if model.encoder_layers else ())):
        if split and not VARIANTS[name].context_parallel:
            raise UserError(
                f"config.model.attention.name: {name} cannot split rows in time over config.mesh."
                f"{' x '.join(split)}; {able('context_parallel')}"
            )
    check_divisible({"B": ("evaluate.batch", config.evaluate.batch)}, mesh, axis_rules)
    processes = jax.process_count()
    divides = config.train.batch % processes == 0
    require(divides, "config.train.batch", config.train.batch, f"a multiple of the {processes} processes")


def open_workdir(config: ConfigDict, workdir: Path | str) -> Path:
    """Make the workdir, or check that the run in it is this one; return its path.

    Raises:
      UserError: it cannot be written, or belongs to another configuration.
    """
    workdir = Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with atomic(workdir / ".probe"):
            pass
        (workdir / ".probe").unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"--workdir: {workdir} cannot be written: {error.strerror}; choose another"
        ) from error
    found = configuration.differences(bound(config, workdir), config)
    found = [change for change in found if not change[0].startswith(FREE)]
    if found:
        listed = "; ".join(f"config.{key} was {a!r} and is {b!r}" for key, a, b in found[:3])
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        raise UserError(
            f"--workdir: {workdir} holds a run of another configuration ({listed}{more}); "
            "choose another --workdir, or give the configuration it began with"
        )
    return workdir


def bound(config: ConfigDict, workdir: Path) -> ConfigDict:
    """Return the configuration that the workdir is bound to, ``config`` where there is none."""
    return read_config(workdir) if (workdir / CONFIG).exists() else config


def keep_config(config: ConfigDict, workdir: Path) -> None:
    """Write ``config.json``, which binds the workdir to this configuration, unless it is there."""
    if jax.process_index() == 0 and not (workdir / CONFIG).exists():
        with atomic(workdir / CONFIG) as file:
            file.write(configuration.to_json(config).encode())


def forget_text(workdir: Path) -> None:
    """Remove what a run that ended before it began kept of its text, which may have been another."""
    if not (workdir / CONFIG).exists():
        for name in (RECORD, TOKENISER):
            (workdir / name).unlink(missing_ok=True)


def read_config(workdir: Path | str) -> ConfigDict:
    """Return the configuration of the run in ``workdir``.

    Raises:
      UserError: there is no run, or its ``config.json`` cannot be read.
    """
    path = Path(workdir) / CONFIG
    try:
        return configuration.from_json(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"--workdir: {workdir} holds no run (there is no {CONFIG})") from error
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"--workdir: {path} cannot be read ({reason}); restore it or choose another"
        ) from error


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Hold the workdir for one training at a time; the system frees it however the process ends.

    Raises:
      UserError: another process holds it.
    """
    if jax.process_index() != 0:
        yield
        return
    with open(workdir / LOCK, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"--workdir: {workdir} is being trained in by another process; wait or choose another"
            ) from error
        except OSError:
            pass  # a file system without locks
        yield
