"""What recurrent mixers share around their memory: the base class, decays of published form, normed gates."""

from __future__ import annotations

import math
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastformer.attention.mixer import Mixer
from fastformer.attention.recurrence import Memory, Tokens, empty_memory, loop, recur
from fastformer.core.errors import require
from fastformer.core.layers import Linear, RMSNorm
from fastformer.core.seq import Seq


class Recurrent(Mixer):
    """A mixer whose past is one memory a head: a subclass says what a token does to it in ``tokens``."""

    causal: ClassVar[bool] = True
    streaming: ClassVar[bool] = True
    context_parallel: ClassVar[bool] = True
    rotary: ClassVar[bool] = False
    order: ClassVar[str] = "T"

    def tokens(self, *qkv: jax.Array) -> Tokens:
        """Return what each token does to the memory, from queries, keys, values and ``gates``."""
        raise NotImplementedError

    def mix(
        self, qkv: tuple[jax.Array, ...], seqs: tuple[Seq, Seq], state: Memory | None
    ) -> tuple[jax.Array, Memory]:
        y_BTHP, state = recur(self.tokens(*qkv), seqs[0], state)
        return y_BTHP.astype(self.dtype), state

    def refer(self, qkv: tuple[jax.Array, ...], seqs: tuple[Seq, Seq]) -> jax.Array:
        return loop(self.tokens(*qkv), seqs[0])

    def empty(self, batch: int, capacity: int, dtype: jnp.dtype) -> Memory:
        return empty_memory(batch, self.groups, self.head_width, self.value_width)

    def normed(self, y_BTHP: jax.Array, x_BTD: jax.Array) -> jax.Array:
        """Return ``rms_norm(y) * silu(x W)`` of each head."""
        y_BTHP = RMSNorm("P", name="head_norm")(y_BTHP)
        return y_BTHP * jax.nn.silu(self.linear("swish_gate", x_BTD, "BTD,DHP->BTHP", *y_BTHP.shape[2:]))

    def vector(self, name: str, letters: str, shape: tuple[int, ...], init: nn.initializers.Initializer):
        """Return a float32 parameter that is no matrix of a linear map, with axes of size 1 for B and T."""
        value = self.param(name, nn.with_logical_partitioning(init, tuple(letters)), shape)
        return value.reshape(1, 1, *shape)

    def low_rank(
        self, name: str, x_BTD: jax.Array, rank: int, shape: tuple[int, int], activation=lambda h: h
    ) -> jax.Array:
        """Return ``activation(x W_down) W_up``, [B, T, *shape], float32."""
        h_BTR = activation(self.linear(f"{name}_down", x_BTD, "BTD,DR->BTR", rank, exact=True))
        up = Linear("BTR,RHP->BTHP", (rank, *shape), name=f"{name}_up")
        return up(h_BTR)

    def decay(self, step: jax.Array, letters: str = "H") -> jax.Array:
        """Return ``-exp(A) softplus(step + bias)``, the log decay, float32, and the softplus.

        A is one number a head, drawn so that exp(A) is uniform in [1, 16]; the bias, of the shape of a
        token's ``step`` [B, T, H] or [B, T, H, K], so that at first the softplus is log-uniform in
        [0.001, 0.1] (Dao & Gu 2024, 2405.21060, section 7).
        """
        heads, shape = step.shape[2], step.shape[2:]
        rate = self.vector("log_rate", "H", (heads,), log_uniform_rate)
        bias = self.vector("step_bias", letters, shape, inverse_softplus_step)
        size = jax.nn.softplus(step.astype(jnp.float32) + bias)
        return -jnp.exp(rate.reshape(1, 1, heads, *(1,) * (step.ndim - 3))) * size, size


class Expanded(Recurrent):
    """A recurrent mixer whose values have a width of their own.

    Attributes:
      value_expand: P / K, such that P is a whole number.
    """

    value_expand: float = 1.0

    def __post_init__(self):
        width = self.value_expand * self.head_width
        whole = width >= 1 and width == round(width)
        require(whole, "value_expand", self.value_expand, f"such that {self.head_width} times it is whole")
        super().__post_init__()

    @property
    def value_width(self) -> int:
        """Return P."""
        return round(self.value_expand * self.head_width)


def log_uniform_rate(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Return the logarithm of numbers uniform in [1, 16]."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 1.0, 16.0))


def inverse_softplus_step(
    key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32
) -> jax.Array:
    """Return what softplus makes log-uniform in [0.001, 0.1]."""
    step = jnp.exp(jax.random.uniform(key, shape, dtype, math.log(1e-3), math.log(1e-1)))
    return step + jnp.log(-jnp.expm1(-step))


def unit(x: jax.Array) -> jax.Array:
    """Return ``x / |x|`` over the last axis, float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)
