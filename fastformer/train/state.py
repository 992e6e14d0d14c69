"""What training changes step by step, made where it will live on the mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from fastformer.core.mesh import shardings
from fastformer.core.seq import whole
from fastformer.train import guard
from fastformer.train.guard import Guard
from fastformer.train.setup import Run


@struct.dataclass
class TrainState:
    """All that a checkpoint needs besides the position in the data.

    Attributes:
      step: int32, updates made.
      params: weights, float32.
      opt_state: of the optimiser; its moments are sharded as their parameters.
      rng: uint32 key data that dropout's key of each step is folded from; it never changes.
      guard: what the steps so far came to: those skipped, the scale of float16 gradients.
      average: exponential average of the weights; None when it is off.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    rng: jax.Array
    guard: Guard
    average: Any = None

    @property
    def weights(self) -> Any:
        """Return the weights to evaluate and to deploy."""
        return self.params if self.average is None else self.average


def _initialise(run: Run, tx: optax.GradientTransformation) -> Callable[[], TrainState]:
    """Return a function that makes the initial state, its arrays boxed with their letters."""

    def init() -> TrainState:
        params_key, dropout_key = jax.random.split(jax.random.key(run.config.seed))
        shape = run.config.train.batch, run.config.data.length
        params = run.model.init(params_key, jnp.zeros(shape, jnp.int32), whole(*shape))["params"]
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            # The optimiser is made on the boxed weights, so that its moments carry their letters.
            opt_state=_without_letters_that_do_not_fit(tx.init(params), params),
            rng=jax.random.key_data(dropout_key),
            guard=guard.new(),
            average=jax.tree.map(jnp.copy, params) if run.config.optimiser.average else None,
        )

    return init


def abstract_state(run: Run, tx: optax.GradientTransformation) -> TrainState:
    """Return the shapes, dtypes and shardings of the state, without making it; within core.mesh.use."""
    init = _initialise(run, tx)
    layout = shardings(jax.eval_shape(init), run.mesh, run.rules)
    shapes = jax.eval_shape(lambda: nn.unbox(init()))
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, layout)


def _without_letters_that_do_not_fit(opt_state: Any, params: Any) -> Any:
    """Return the optimiser's state without the boxes around arrays that are not of their parameter's shape.

    Those are what optax masks out, which is no array, and the rows and columns of factored moments,
    which are small: every device has them whole.
    """
    shapes = {(box.names, box.value.shape) for box in _boxes(params)}

    def fits(box: Any) -> bool:
        return bool(jax.tree.leaves(box.value)) and (box.names, box.value.shape) in shapes

    return jax.tree.map(lambda x: x.value if _is_box(x) and not fits(x) else x, opt_state, is_leaf=_is_box)


def _is_box(x: Any) -> bool:
    return isinstance(x, nn.meta.AxisMetadata)


def _boxes(tree: Any) -> list[Any]:
    return [x for x in jax.tree.leaves(tree, is_leaf=_is_box) if _is_box(x)]


def abstract_params(run: Run) -> Any:
    """Return the shapes, dtypes and shardings of the weights alone; within core.mesh.use."""
    return abstract_state(run, optax.identity()).params


def initial_state(run: Run, tx: optax.GradientTransformation, abstract: TrainState) -> TrainState:
    """Return the state at step 0, each shard made on its own device; within core.mesh.use.

    Its values depend on ``config.seed`` alone, whatever the mesh.
    """
    init = _initialise(run, tx)
    layout = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(lambda: nn.unbox(init()), out_shardings=layout)()
