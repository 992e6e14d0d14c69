"""What each way to save memory or time comes to: planned memory, loss after some steps, tokens a second.

    python -m fastformer.train.measure --config=configs/quickstart.py --steps=20 --config.train.batch=8
    python -m fastformer.train.measure --config=configs/quickstart.py --steps=0     # memory alone

Each row is the configuration with the settings it names, on the same first batches.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from fastformer.core import config as configuration
from fastformer.core import large_pages
from fastformer.core.errors import UserError
from fastformer.core.mesh import use
from fastformer.core.trees import nbytes
from fastformer.report import tables
from fastformer.train.optimiser import make_optimiser
from fastformer.train.setup import build_run
from fastformer.train.state import abstract_state, initial_state
from fastformer.train.step import compile_train_step, put_batch

ARMS: dict[str, dict[str, Any]] = {
    "as configured": {},
    "accumulate 4": {"train.accumulate": 4},
    "remat full": {"model.remat": ("full",)},
    "remat dots": {"model.remat": ("dots",)},
    "remat full, none": {"model.remat": ("full", "none")},
    "scan": {"model.scan": True},
    "loss_chunk 64": {"model.loss_chunk": 64},
    "scan, remat full, loss_chunk 64": {"model.scan": True, "model.remat": ("full",), "model.loss_chunk": 64},
    "bfloat16": {"model.dtype": "bfloat16"},
    "float16": {"model.dtype": "float16"},
    "fp8": {"model.dtype": "fp8"},
    "adafactor": {"optimiser.name": "adafactor", "optimiser.b1": 0.0},
    "lion": {"optimiser.name": "lion", "optimiser.learning_rate": 3e-4},
    "adamw": {"optimiser.name": "adamw", "optimiser.learning_rate": 3e-3},
    "muon": {"optimiser.name": "muon"},
}


class Row(NamedTuple):
    """What one arm came to.

    Attributes:
      planned: bytes that XLA plans for on one device.
      moments: bytes of the optimiser's state.
      loss: nats per target of the last step; None where none was made.
      speed: tokens a second, the first step left out.
      compiling: seconds.
    """

    planned: int
    moments: int
    loss: float | None
    speed: float | None
    compiling: float


def measure(config: ConfigDict, settings: Mapping[str, Any], workdir: Path, steps: int) -> Row:
    """Return what ``config`` with ``settings`` comes to over ``steps`` steps."""
    config = ConfigDict(config.to_dict()).lock()
    for key, value in settings.items():
        configuration.set_key(config, key, value)
    run, (tx, schedule) = build_run(config, workdir), make_optimiser(config)
    with use(run.mesh, run.rules):
        abstract = abstract_state(run, tx)
        program = compile_train_step(run, tx, schedule, abstract)
        moments, loss, speed = nbytes(abstract.opt_state), None, None
        if steps:
            state, iterator = initial_state(run, tx, abstract), run.data.train_iterator(config.train.batch, 0)
            for step in range(steps):
                state, metrics = program.call(state, put_batch(run, next(iterator)))
                if step == 0:
                    jax.block_until_ready(metrics)
                    start = time.perf_counter()
            loss = float(metrics["loss"])
            tokens = (steps - 1) * config.train.batch * config.data.length
            speed = tokens / (time.perf_counter() - start) if steps > 1 else None
    return Row(program.memory_bytes, moments, loss, speed, program.seconds)


def main(argv: Sequence[str]) -> int:
    """Print the table; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--steps", type=int, default=20)
    flags, rest = parser.parse_known_args(argv)
    overrides = [re.fullmatch(r"--config\.([^=]+)=(.*)", word) for word in rest]
    if not all(overrides):
        parser.error(f"cannot read {rest}")
    rows = []
    with tempfile.TemporaryDirectory() as workdir:
        try:
            config = configuration.load(flags.config, [found.groups() for found in overrides])
            for name, settings in ARMS.items():
                row = measure(config, settings, Path(workdir), flags.steps)
                cells = tables.nbytes(row.planned), tables.nbytes(row.moments), tables.number(row.loss)
                rows.append((name, *cells, tables.number(row.speed, 3), tables.seconds(row.compiling)))
                print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
        except UserError as error:
            print(error, file=sys.stderr)
            return 2
    headers = ("", "planned memory", "moments", f"loss, step {flags.steps}", "tokens/s", "compiling")
    print(tables.table(headers, rows))
    return 0


if __name__ == "__main__":
    large_pages.start_again()
    sys.exit(main(sys.argv[1:]))
