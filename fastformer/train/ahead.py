"""Ahead of time: compile the train step for TPUs that are not here, and say what it needs there."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from ml_collections import ConfigDict

from fastformer import models, tasks
from fastformer.core import config as configuration
from fastformer.core.config import section
from fastformer.core.errors import UserError, lookup
from fastformer.core.mesh import MeshConfig, make_mesh, rules, use
from fastformer.core.trees import count, nbytes
from fastformer.data import DataConfig
from fastformer.report import tables
from fastformer.report.collectives import Traffic, traffic
from fastformer.report.cost import flops
from fastformer.report.roofline import CHIPS, Chip, Estimate, estimate
from fastformer.train import setup
from fastformer.train.optimiser import make_optimiser
from fastformer.train.precision import Plan
from fastformer.train.setup import Run, check_sizes
from fastformer.train.state import abstract_state
from fastformer.train.step import abstract_batch, jit_train_step

SIZE = r"[1-9]\d{0,3}"  # libtpu divides by a size of 0, which ends the process
TOPOLOGY = re.compile(rf"(?:(?P<slices>{SIZE})\*)?(?P<chip>\w+):(?P<shape>{SIZE}(?:x{SIZE})*)$")
OUT_OF_MEMORY = re.compile(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm", re.IGNORECASE)
TASKS = ("text", "code", "mlm")  # whose batches are rows of tokens, as NoData has them
HELP = (
    "What helps, in this order: config.model.remat=full, config.model.loss_chunk=512, config.mesh.fsdp=-1 "
    "(shards of weights and moments), config.train.accumulate=2 or more, config.model.dtype=bfloat16."
)


class NoData:
    """Stands where a run has its text: batches of its shape, of zeros that take no memory.

    Attributes:
      vocabulary: V.
    """

    def __init__(self, config: ConfigDict):
        self.vocabulary = config.data.vocabulary if config.data.tokeniser == "bpe" else 257
        self._length = config.data.length

    def heldout_batches(
        self, batch: int, overlap: int = 0, limit: int = 0
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yield a batch [B, T]."""
        kinds = dict.fromkeys(("tokens_BT", "targets_BT", "segment_BT", "position_BT"), np.int32)
        kinds["weights_BT"] = np.float32
        yield {
            name: np.broadcast_to(np.zeros((), kind), (batch, self._length)) for name, kind in kinds.items()
        }


def devices_of(topology: str) -> tuple[Chip, list[Any], int]:
    """Return the chip, the devices and how many are in a slice of ``"v5e:16x16"`` or ``"2*v5e:16x16"``.

    Raises:
      UserError: there is no such topology, or libtpu, which knows them, is not installed.
    """
    found = TOPOLOGY.match(topology)
    if not found:
        raise UserError(
            f"--topology: {topology!r} is not CHIP:AxB, as v5e:16x16, or SLICES*CHIP:AxB, as 2*v5e:16x16"
        )
    chip = lookup(CHIPS, found["chip"], "--topology")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu would ask a cloud's metadata server
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is held that two could want
    slices = int(found["slices"] or 1)
    try:
        with _silence():
            made = topologies.get_topology_desc(
                f"{found['chip']}:{found['shape']}", "tpu", **({"num_slices": slices} if slices > 1 else {})
            )
    except Exception as error:  # whatever libtpu raises
        reason = str(error).partition("\n")[0][:150]
        hint = " (pip install libtpu)" if "libtpu" in reason or "plugin" in reason.lower() else ""
        raise UserError(f"--topology: {topology!r} cannot be had: {reason}{hint}") from error
    return chip, list(made.devices), len(made.devices) // slices


def compile_for(config: ConfigDict, topology: str) -> dict[str, Any]:
    """Return what the train step of a configuration needs on each device of a TPU topology.

    Nothing is run and no data is opened. The program is the one that would run there, kernels and all;
    its FLOPs are counted in the traced program with blocked XLA in the kernels' place, of the same
    products.

    Where the steps are made in several precisions, it is the one that needs most memory.

    Raises:
      UserError: the configuration or the topology cannot be.
    """
    found = [_compile(config, topology, policy) for policy in Plan(config).names]
    return max(found, key=lambda one: one["peak"])


def _compile(config: ConfigDict, topology: str, policy: str) -> dict[str, Any]:
    chip, devices, per_slice = devices_of(topology)
    run, (tx, schedule) = _run(config, devices), make_optimiser(config)
    start = time.perf_counter()
    with use(run.mesh, run.rules):
        abstract, batch = abstract_state(run, tx), abstract_batch(run)
        shard = {name: _of_device(tree) for name, tree in _parts(abstract, batch).items()}
        lowered = jit_train_step(run, tx, schedule, abstract, policy).lower(abstract, batch)
        found = {
            "name": config.name,
            "topology": topology,
            "precision": policy,
            "mesh": dict(run.mesh.shape),
            "devices": len(devices),
            "parameters": count(abstract.params),
            "bytes": shard,
            "hbm": chip.of_device("hbm"),
        } | _flops(run, tx, schedule, abstract, batch)
        try:
            with _silence():
                compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            return found | _needed(error) | {"compile_seconds": time.perf_counter() - start}
    plan = compiled.memory_analysis()
    sent = traffic(compiled.as_text(), per_slice if per_slice < len(devices) else 0)
    far = sum(kind.far_bytes for kind in sent.values())
    near = sum(kind.bytes for kind in sent.values()) - far
    arguments = plan.argument_size_in_bytes + plan.output_size_in_bytes
    moved = arguments + 2 * plan.temp_size_in_bytes
    share = [found[name] / len(devices) for name in ("flops", "useful_flops")]
    return found | {
        "peak": plan.argument_size_in_bytes
        + plan.output_size_in_bytes
        - plan.alias_size_in_bytes
        + plan.temp_size_in_bytes,
        "temporaries": plan.temp_size_in_bytes,
        "traffic": {name: kind._asdict() for name, kind in sent.items()},
        "estimate": dataclasses.asdict(estimate(chip, *share, moved, near, far)),
        "compile_seconds": time.perf_counter() - start,
    }


def _run(config: ConfigDict, devices: list[Any]) -> Run:
    task = tasks.build(config)
    if task.name not in TASKS:
        known = ", ".join(TASKS)
        raise UserError(f"config.task.name: --mode=compile knows the batches of {known}, not of {task.name}")
    if config.compress.methods:
        raise UserError("config.compress.methods: --mode=compile knows runs without compression; make it ()")
    section(setup.TrainConfig, config, "train")
    length = section(DataConfig, config, "data").length
    mesh, axis_rules = make_mesh(section(MeshConfig, config, "mesh"), devices), rules(config.sharding)
    data = NoData(config)
    model = models.build(config, data.vocabulary, length, task.head)
    check_sizes(config, data.vocabulary, mesh, axis_rules)
    return Run(config, Path(), mesh, axis_rules, data, model, task)


def _flops(run: Run, tx: Any, schedule: Any, abstract: Any, batch: Any) -> dict[str, int]:
    """Return the FLOPs of the step as it stands, and of one that computes nothing twice.

    Where time is split, the former are those of the busiest shard times all shards: with a causal ring it
    looks at all keys. The latter are of whole rows.
    """

    def of(changes: dict[str, Any]) -> int:
        config = run.config.copy_and_resolve_references()
        for key, value in changes.items():
            configuration.set_key(config, key, value)
        model = models.build(config, run.data.vocabulary, config.data.length, run.task.head)
        plain = dataclasses.replace(run, config=config, model=model)
        return flops(jit_train_step(plain, tx, schedule, abstract), abstract, batch)

    xla = {"model.implementation": "xla"}
    once = xla | {"model.remat": ("none",) * len(run.config.model.remat), "model.loss_chunk": 0}
    found = of(xla)
    with use(run.mesh, ()):
        return {"flops": found, "useful_flops": of(once)}


def _parts(abstract: Any, batch: Any) -> dict[str, Any]:
    optimiser = (abstract.opt_state, abstract.average)
    return {"parameters": abstract.params, "optimiser": optimiser, "batch": batch}


def _of_device(tree: Any) -> int:
    """Return the bytes of one device's shards."""
    shards = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype), tree)
    return nbytes(shards)


def _needed(error: Exception) -> dict[str, float]:
    """Return the bytes that did not fit, and those that there were; any other error is raised again."""
    found = OUT_OF_MEMORY.search(str(error))
    if not found:
        raise error
    power = {"K": 10, "M": 20, "G": 30, "T": 40}
    sizes = (float(found[i]) * 2.0 ** power[found[i + 1].upper()] for i in (1, 3))
    return dict(zip(("peak", "hbm"), sizes))


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep libtpu's own lines off the screen; it writes them past Python."""
    with tempfile.TemporaryFile() as aside:
        kept = os.dup(2)
        os.dup2(aside.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def describe(found: dict[str, Any]) -> str:
    """Return the findings as Markdown."""
    rows = [
        ("parameters, all", tables.count(found["parameters"])),
        *((f"{name}, bytes", tables.nbytes(size)) for name, size in found["bytes"].items()),
    ]
    if "temporaries" in found:
        rows.append(("activations and other temporaries", tables.nbytes(found["temporaries"])))
    fits = found["peak"] <= found["hbm"]
    rows += [
        ("peak, by XLA's plan", tables.nbytes(found["peak"])),
        ("memory of the device", tables.nbytes(found["hbm"])),
        ("FLOPs of a step", tables.count(found["flops"] / found["devices"])),
        ("of those useful (nothing twice)", tables.count(found["useful_flops"] / found["devices"])),
    ]
    for name, kind in found.get("traffic", {}).items():
        kind = Traffic(**kind)
        far = f", {tables.nbytes(kind.far_bytes)} of it between slices" if kind.far_bytes else ""
        rows.append((f"{name}, {kind.calls} times", f"{tables.nbytes(kind.bytes)} sent{far}"))
    title = f"{found['name']} on {found['topology']}: " + " x ".join(
        f"{k} {v}" for k, v in found["mesh"].items()
    )
    lines = [title, "", tables.table(("of each device", ""), rows), "", _verdict(found, fits)]
    return "\n".join(lines)


def _verdict(found: dict[str, Any], fits: bool) -> str:
    if not fits:
        return f"It does not fit: {tables.nbytes(found['peak'])} of {tables.nbytes(found['hbm'])}. {HELP}"
    e = Estimate(**found["estimate"])
    return (
        f"It fits. Estimate, not a measurement: a step takes {e.best:.3g} s where all overlaps (bound by "
        f"{e.bound}) to {e.worst:.3g} s where nothing does; of the peak {e.useful / e.best:.0%} to "
        f"{e.useful / e.worst:.0%} is useful. Compiled in {found['compile_seconds']:.0f} s."
    )
