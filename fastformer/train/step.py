"""One optimiser step, compiled ahead of time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fastformer.core.dtypes import POLICIES, Policy
from fastformer.core.errors import UserError
from fastformer.core.mesh import batch_sharding
from fastformer.report.cost import flops_of
from fastformer.train.gradients import NOTHING, Batch, make_gradients
from fastformer.train.guard import judge
from fastformer.train.precision import Plan, in_policy
from fastformer.train.schedules import Schedule
from fastformer.train.setup import Run
from fastformer.train.state import TrainState

Metrics = dict[str, jax.Array]


@dataclass(frozen=True)
class CompiledStep:
    """A train step for one shape of batch.

    Attributes:
      call: ``(state, batch) -> (state, metrics)``; it takes over the state's memory.
      policy: a row of core.dtypes.POLICIES.
      flops: of its matrix products, as it stands, over all devices; None where they cannot be counted.
      seconds: spent compiling.
      memory_bytes: that XLA plans for on one device: arguments, results and temporaries.
    """

    call: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    policy: str
    flops: int | None
    seconds: float
    memory_bytes: int


def make_train_step(
    run: Run, tx: optax.GradientTransformation, schedule: Schedule, policy: Policy
) -> Callable[[TrainState, Batch, Mapping[str, Any]], tuple[TrainState, Metrics]]:
    """Return the step as a plain function ``(state, batch, frozen) -> (state, metrics)``.

    ``frozen`` is what compression's losses read besides the batch.

    The loss is in nats per target over the whole batch of all devices; ``metrics`` holds ``loss``
    and ``targets`` of the batch, the ``gradient_norm`` before clipping, the ``learning_rate``,
    whether the step was ``taken`` (else the weights stay as they were), the ``streak`` of those that
    were not, their number ``skipped``, and with a scaled policy the ``loss_scale``.
    """
    gradients_of, decay, spike = make_gradients(run), run.config.optimiser.average, run.config.train.spike

    def train_step(
        state: TrainState, batch: Batch, frozen: Mapping[str, Any] = NOTHING
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        scale = state.guard.scale if policy.scaled else 1.0
        found = gradients_of(state.params, batch, key, scale, state.step, frozen)
        norm = optax.tree.norm(found.mean)
        taken, guard = judge(state.guard, found.loss, norm, policy.scaled, spike)
        updates, opt_state = tx.update(found.mean, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = _averaged(state, params, decay) if decay else None
        metrics = {
            "loss": found.loss,
            "targets": found.targets,
            "gradient_norm": norm,
            # A step that is not taken does not count: the schedule waits, as the optimiser does.
            "learning_rate": jnp.asarray(schedule(state.step - state.guard.skipped), jnp.float32),
            "taken": taken,
            "streak": guard.streak,
            "skipped": guard.skipped,
        }
        metrics |= {"loss_scale": state.guard.scale} if policy.scaled else {}
        new, old = (params, opt_state, average), (state.params, state.opt_state, state.average)
        params, opt_state, average = jax.tree.map(lambda a, b: jnp.where(taken, a, b), new, old)
        return TrainState(state.step + 1, params, opt_state, state.rng, guard, average), metrics

    return train_step


def _averaged(state: TrainState, params: Any, decay: float) -> Any:
    """Return the average after one more update; it follows quickly while there are few."""
    made = state.step.astype(jnp.float32)
    return optax.incremental_update(params, state.average, 1 - jnp.minimum(decay, (1 + made) / (10 + made)))


def jit_train_step(
    run: Run, tx: optax.GradientTransformation, schedule: Schedule, abstract: TrainState, policy: str = ""
) -> Any:
    """Return the jitted step in a policy (default: model.dtype); the state stays where it is on the mesh."""
    name = policy or run.config.model.dtype
    layout = jax.tree.map(lambda x: x.sharding, abstract)
    whole = NamedSharding(run.mesh, PartitionSpec())
    step = make_train_step(in_policy(run, name), tx, schedule, POLICIES[name])
    return jax.jit(step, donate_argnums=0, out_shardings=(layout, whole))


def compile_train_step(
    run: Run,
    tx: optax.GradientTransformation,
    schedule: Schedule,
    abstract: TrainState,
    policy: str = "",
    frozen: Mapping[str, Any] = NOTHING,
) -> CompiledStep:
    """Return the step compiled for the batches of ``run``, with ``frozen`` in it; within core.mesh.use.

    Args:
      policy: a row of core.dtypes.POLICIES; "" is model.dtype.
    """
    frozen = dict(frozen)
    start = time.perf_counter()
    step = jit_train_step(run, tx, schedule, abstract, policy)
    traced = step.trace(abstract, abstract_batch(run), frozen)
    compiled = traced.lower().compile()
    plan = compiled.memory_analysis()
    # Donated arguments are counted among the results too.
    memory = (
        plan.argument_size_in_bytes
        + plan.output_size_in_bytes
        - plan.alias_size_in_bytes
        + plan.temp_size_in_bytes
    )
    return CompiledStep(
        lambda state, batch: compiled(state, batch, frozen),
        policy or run.config.model.dtype,
        count(traced),
        time.perf_counter() - start,
        int(memory),
    )


def count(traced: Any) -> int | None:
    """Return the FLOPs of a traced program; None where a loop hides how many there are."""
    try:
        return flops_of(traced.jaxpr)
    except ValueError:
        return None


def compile_all(
    run: Run,
    tx: optax.GradientTransformation,
    schedule: Schedule,
    abstract: TrainState,
    plan: Plan,
    frozen: Mapping[str, Any],
) -> dict[str, CompiledStep]:
    """Return the step compiled in every policy of the plan, once each; within core.mesh.use."""
    return {name: compile_train_step(run, tx, schedule, abstract, name, frozen) for name in plan.names}


def abstract_batch(run: Run) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shapes, dtypes and shardings of a training batch over all devices.

    They are read off a held-out batch, which leaves the order of the training data alone.
    """
    example = next(run.data.heldout_batches(run.config.train.batch, limit=1))
    layout = batch_sharding(run.mesh, run.rules)
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout) for name, x in example.items()}


def part_read(run: Run) -> tuple[int, int]:
    """Return which part of each batch this process reads, of how many.

    Processes whose devices lie along other axes of the mesh than those of rows read the same part.

    Raises:
      UserError: the rows of this process's devices are not one of equal parts.
    """
    batch = run.config.train.batch
    spans = batch_sharding(run.mesh, run.rules).addressable_devices_indices_map((batch,)).values()
    ends = {span.indices(batch)[:2] for (span,) in spans}
    first, last = min(start for start, _ in ends), max(end for _, end in ends)
    size = last - first
    if sum(end - start for start, end in ends) != size or first % size or batch % size:
        raise UserError(
            "config.mesh: the devices of a process must hold rows that follow one another; choose data and "
            "fsdp that the devices of a process divide, or that divide them"
        )
    return first // size, batch // size


def put_batch(run: Run, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Return the global batch whose rows of this process are ``batch``."""
    layout = batch_sharding(run.mesh, run.rules)
    return {name: jax.make_array_from_process_local_data(layout, x) for name, x in batch.items()}


def peak_memory_bytes(mesh: Mesh, step_fn: CompiledStep) -> int:
    """Return the most memory one device held: as it counted, or as XLA planned where it does not count."""
    stats = mesh.local_devices[0].memory_stats() or {}
    return int(stats.get("peak_bytes_in_use", step_fn.memory_bytes))
