"""The layers that every floor above builds on: a linear map spelt in the alphabet, and norms."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastformer.core.alphabet import constrain
from fastformer.core.seq import Seq


class Linear(nn.Module):
    """A linear map, ``y = einsum(spec, x, weight)``, plus a bias where asked for.

    Attributes:
      spec: such as ``"BTD,DHK->BTHK"``; the weight's letters are its logical axes too.
      shape: of the weight, a size per letter.
      scale: the initial weights are normal with deviation ``scale / sqrt(fan in)``.
      dtype: of the product; the weight is float32.
    """

    spec: str
    shape: tuple[int, ...]
    scale: float = 1.0
    dtype: jnp.dtype = jnp.float32
    bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        operands, out = self.spec.split("->")
        letters = operands.split(",")[1]
        fan_in = math.prod(size for letter, size in zip(letters, self.shape) if letter not in out)
        init = nn.initializers.normal(self.scale / math.sqrt(fan_in))
        weight = self.param("weight", nn.with_logical_partitioning(init, tuple(letters)), self.shape)
        y = jnp.einsum(self.spec, x.astype(self.dtype), weight.astype(self.dtype))
        if self.bias:
            last = tuple(letter for letter in letters if letter in out)
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, last)
            y = self.with_bias(y, self.param("bias", zeros, y.shape[-len(last) :]))
        return constrain(y, out)

    def with_bias(self, y: jax.Array, bias: jax.Array) -> jax.Array:
        """Return the products with the bias added, also where something else has made them."""
        return y + _broadcast(bias, y.ndim).astype(self.dtype)


class RMSNorm(nn.Module):
    """``x / rms(x) * scale`` over the last axis, in float32 (Zhang & Sennrich 2019, 1910.07467, eq. 4).

    Attributes:
      letter: of the last axis.
      epsilon: added to the mean square.
    """

    letter: str = "D"
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param(
            "scale", nn.with_logical_partitioning(nn.initializers.ones, (self.letter,)), x.shape[-1:]
        )
        x32 = x.astype(jnp.float32)
        y = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.epsilon)
        return (y * _broadcast(scale, x.ndim)).astype(x.dtype)


class LayerNorm(nn.Module):
    """``(x - mean) / deviation * scale + bias`` over the last axis, in float32 (Ba et al. 2016, 1607.06450).

    Attributes:
      letter: of the last axis.
      epsilon: added to the variance.
    """

    letter: str = "D"
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        letters = (self.letter,)
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones, letters), x.shape[-1:])
        bias = self.param("bias", nn.with_logical_partitioning(nn.initializers.zeros, letters), x.shape[-1:])
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.epsilon)
        return (y * _broadcast(scale, x.ndim) + _broadcast(bias, x.ndim)).astype(x.dtype)


def _broadcast(last: jax.Array, ndim: int) -> jax.Array:
    return last.reshape((1,) * (ndim - last.ndim) + last.shape)


def zero_padding(x: jax.Array, seq: Seq) -> jax.Array:
    """Return ``x`` ``[B, T, …]`` with zeros at padding, so that nothing there, NaN even, goes on."""
    real = (seq.segment_BT > 0).reshape(seq.segment_BT.shape + (1,) * (x.ndim - 2))
    return jnp.where(real, x, jnp.zeros((), x.dtype))
