"""One optimiser step, compiled ahead of time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from fastformer.compress import at
from fastformer.core.mesh import batch_sharding
from fastformer.train.optimiser import Schedule
from fastformer.train.setup import Run
from fastformer.train.state import TrainState

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]

NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class CompiledStep:
    """A train step for one shape of batch.

    Attributes:
      call: ``(state, batch) -> (state, metrics)``; it takes over the state's memory.
      traced: the same, not compiled: what counts FLOPs.
      seconds: spent compiling.
      memory_bytes: that XLA plans for on one device: arguments, results and temporaries.
    """

    call: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    traced: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    seconds: float
    memory_bytes: int


def make_train_step(
    run: Run, tx: optax.GradientTransformation, schedule: Schedule
) -> Callable[[TrainState, Batch, Mapping[str, Any]], tuple[TrainState, Metrics]]:
    """Return the step as a plain function ``(state, batch, frozen) -> (state, metrics)``.

    ``frozen`` is what compression's losses read besides the batch.

    The loss is in nats per target over the whole batch of all devices; ``metrics`` holds ``loss``
    and ``targets`` of the batch, the ``gradient_norm`` before clipping and the ``learning_rate``.
    """
    loss_of = run.compression.loss(run.task.loss)

    def train_step(
        state: TrainState, batch: Batch, frozen: Mapping[str, Any] = NOTHING
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)

        def mean_loss(params: Any) -> tuple[jax.Array, jax.Array]:
            nats, targets = loss_of(at(run.model, state.step), params, {**batch, **frozen}, key)
            return nats / jnp.maximum(targets, 1), targets

        (loss, targets), gradients = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
        updates, opt_state = tx.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": loss,
            "targets": targets,
            "gradient_norm": optax.tree.norm(gradients),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        }
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return train_step


def jit_train_step(
    run: Run, tx: optax.GradientTransformation, schedule: Schedule, abstract: TrainState
) -> Any:
    """Return the jitted step; what comes out lies on the mesh as what went in."""
    layout = jax.tree.map(lambda x: x.sharding, abstract)
    whole = NamedSharding(run.mesh, PartitionSpec())
    return jax.jit(make_train_step(run, tx, schedule), donate_argnums=0, out_shardings=(layout, whole))


def compile_train_step(
    run: Run,
    tx: optax.GradientTransformation,
    schedule: Schedule,
    abstract: TrainState,
    frozen: Mapping[str, Any] = NOTHING,
) -> CompiledStep:
    """Return the step compiled for the batches of ``run``, with ``frozen`` in it; within core.mesh.use."""
    frozen = dict(frozen)
    start = time.perf_counter()
    lowered = jit_train_step(run, tx, schedule, abstract).lower(abstract, abstract_batch(run), frozen)
    compiled = lowered.compile()
    plan = compiled.memory_analysis()
    # Donated arguments are counted among the results too.
    memory = (
        plan.argument_size_in_bytes
        + plan.output_size_in_bytes
        - plan.alias_size_in_bytes
        + plan.temp_size_in_bytes
    )
    plain, seconds = make_train_step(run, tx, schedule), time.perf_counter() - start
    return CompiledStep(
        lambda state, batch: compiled(state, batch, frozen),
        lambda state, batch: plain(state, batch, frozen),
        seconds,
        int(memory),
    )


def abstract_batch(run: Run) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shapes, dtypes and shardings of a training batch over all devices.

    They are read off a held-out batch, which leaves the order of the training data alone.
    """
    example = next(run.data.heldout_batches(run.config.train.batch, limit=1))
    layout = batch_sharding(run.mesh, run.rules)
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout) for name, x in example.items()}


def put_batch(run: Run, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Return the global batch whose rows of this process are ``batch``."""
    layout = batch_sharding(run.mesh, run.rules)
    return {name: jax.make_array_from_process_local_data(layout, x) for name, x in batch.items()}
