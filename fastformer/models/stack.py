"""The stack of blocks: one after another, or a scan over repeats of the layer pattern; what it remembers."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastformer.core.seq import Seq
from fastformer.core.trees import SCANNED
from fastformer.models.block import Block
from fastformer.models.config import ModelConfig

# What the forward pass of a block keeps for the backward pass; the rest is computed again.
POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
DETERMINISTIC = 4  # its place among the arguments of Block.__call__, self included


def run_stack(
    config: ModelConfig, length: int, x_BTD: jax.Array, seq: Seq, state: Any, deterministic: bool
) -> tuple[jax.Array, tuple]:
    """Return ``(x_BTD, state)`` after all blocks: submodules of the module at work, in its compact method.

    Args:
      length: T that the model is trained at.
      state: as ``init_state`` makes it; None is an empty past.
    """
    if config.scan:
        over = nn.scan(
            Repeat,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, 0, nn.broadcast),
            length=config.layers // config.period,
            metadata_params={nn.PARTITION_NAME: "L"},
        )
        states = state or (None,) * config.period
        return over(config, length, name=SCANNED)(x_BTD, seq, states, deterministic)
    states, ends = state or (None,) * config.layers, []
    for layer in range(config.layers):
        block = _block(config, layer, True)(config, layer, length, name=f"layer_{layer}")
        x_BTD, end = block(x_BTD, seq, states[layer], deterministic)
        ends.append(end)
    return x_BTD, tuple(ends)


class Repeat(nn.Module):
    """One period of the layer pattern: what a scan repeats, with weights of its own each time."""

    config: ModelConfig
    length: int

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, seq: Seq, states: tuple, deterministic: bool
    ) -> tuple[jax.Array, tuple]:
        """Return ``(x_BTD, states)``."""
        ends = []
        for slot in range(self.config.period):
            block = _block(self.config, slot, False)(self.config, slot, self.length, name=f"layer_{slot}")
            x_BTD, end = block(x_BTD, seq, states[slot], deterministic)
            ends.append(end)
        return x_BTD, tuple(ends)


def _block(config: ModelConfig, layer: int, prevent_cse: bool) -> type[nn.Module]:
    """Return Block, as the layer remembers it; a scan needs no guard against what XLA would merge."""
    policy = config.remat[layer % len(config.remat)]
    if policy == "none":
        return Block
    return nn.remat(Block, prevent_cse=prevent_cse, static_argnums=(DETERMINISTIC,), policy=POLICIES[policy])


def init_state(config: ModelConfig, length: int, batch: int, capacity: int) -> tuple:
    """Return the empty state of the stack, for ``capacity`` tokens a row.

    A tuple over layers; of scanned layers, over those of one period, with a leading axis of repeats.
    """
    layers = range(config.period if config.scan else config.layers)
    mixers = (config.mixer(layer, length, detached=True) for layer in layers)
    states = tuple(mixer.init_state(batch, capacity) for mixer in mixers)
    if not config.scan:
        return states
    repeats = config.layers // config.period
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (repeats, *x.shape)), states)


def unstack(params: Any) -> Any:
    """Return the parameters of a model with scanned layers as those of the same model without."""
    if SCANNED not in params:
        return params
    stacked = params[SCANNED]
    repeats = jax.tree.leaves(stacked)[0].shape[0]
    layers = {}
    for repeat in range(repeats):
        for slot in range(len(stacked)):
            one = jax.tree.map(lambda x, repeat=repeat: x[repeat], stacked[f"layer_{slot}"])
            layers[f"layer_{repeat * len(stacked) + slot}"] = one
    return {name: value for name, value in params.items() if name != SCANNED} | layers
