"""FNet: Fourier transforms over time and width in place of attention (Lee-Thorp et al. 2021, 2105.03824)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from fastformer.attention.mixer import Mixer
from fastformer.attention.packed import per_segment, runs
from fastformer.core.alphabet import constrain
from fastformer.core.layers import zero_padding
from fastformer.core.seq import Seq


def reference(x_BTD: jax.Array, *, seq: Seq) -> jax.Array:
    """Return ``Re(F_time(F_width(x)))`` of each segment, [B, T, D] float32 (2105.03824, eq. 3).

    By the matrices of both transforms: an entry is ``exp(-2 pi i n k / size)``.
    """
    x_BTD = zero_padding(x_BTD, seq).astype(jnp.float32)
    width = x_BTD.shape[-1]
    where = runs(seq.segment_BT)
    index_BT = jnp.arange(x_BTD.shape[1])[None, :] - where.first_BT
    size_BT1 = where.size_BT[:, :, None]
    angle_BTS = 2 * math.pi * ((index_BT[:, :, None] * index_BT[:, None, :]) % size_BT1) / size_BT1
    angle_DD = 2 * math.pi * (jnp.outer(jnp.arange(width), jnp.arange(width)) % width) / width
    same_BTS = (seq.segment_BT[:, :, None] == seq.segment_BT[:, None, :]) & (seq.segment_BT > 0)[:, None, :]
    cos_BTD, sin_BTD = (jnp.einsum("BTD,DF->BTF", x_BTD, wave(angle_DD)) for wave in (jnp.cos, jnp.sin))
    cos_BTS, sin_BTS = (jnp.where(same_BTS, wave(angle_BTS), 0.0) for wave in (jnp.cos, jnp.sin))
    return jnp.einsum("BTS,BSD->BTD", cos_BTS, cos_BTD) - jnp.einsum("BTS,BSD->BTD", sin_BTS, sin_BTD)


def forward(x_BTD: jax.Array, *, seq: Seq) -> jax.Array:
    """Return ``y_BTD`` in O(T log T), whatever the lengths of the segments."""
    y_BTD = per_segment(_fourier, zero_padding(x_BTD, seq).astype(jnp.float32), (), seq.segment_BT)
    return y_BTD.astype(x_BTD.dtype)


def _fourier(x_BNCD: jax.Array, size_BN: jax.Array, _: Any) -> jax.Array:
    """Return the transform of each slot at its own size, by Bluestein's convolution with a chirp.

    As ``n k = (n² + k² - (k - n)²) / 2``, a transform of any size is a product with a chirp, a
    convolution with its inverse, and the product again.
    """
    length = x_BNCD.shape[2]
    period = 1 << (2 * length - 2).bit_length()
    x_BNCD = constrain(x_BNCD, "BNCD")
    index = jnp.arange(length, dtype=jnp.uint32)[None, None, :]
    size = jnp.maximum(size_BN, 1).astype(jnp.uint32)[:, :, None]
    # Reduced before it is a float: the angle is exact for every length below 65536.
    angle_BNC = math.pi * ((index * index) % (2 * size)).astype(jnp.float32) / size.astype(jnp.float32)
    chirp_BNC = jax.lax.complex(jnp.cos(angle_BNC), jnp.sin(angle_BNC))
    around = jnp.zeros((*chirp_BNC.shape[:2], period - 2 * length + 1), chirp_BNC.dtype)
    kernel = jnp.concatenate([chirp_BNC, around, jnp.flip(chirp_BNC[:, :, 1:], axis=2)], axis=2)
    spectrum = jnp.fft.fft(kernel, axis=2)[..., None]
    back_BNC1 = jnp.conj(chirp_BNC)[..., None]
    y_BNCD = jnp.fft.fft(jnp.fft.fft(x_BNCD, axis=3) * back_BNC1, period, axis=2)
    y_BNCD = jnp.fft.ifft(y_BNCD * spectrum, axis=2)[:, :, :length]
    return constrain(jnp.real(y_BNCD * back_BNC1), "BNCD")


class FNet(Mixer):
    """The real part of a two-dimensional Fourier transform: O(T log T), and not one parameter.

    As published it is not scaled: y is some sqrt(T D) times x, which the norm after the layer undoes.
    Heads, positions, ``qk_norm``, ``short_conv`` and ``out_scale`` do nothing: there are no queries, keys and
    projections.

    Attributes:
      orthonormal: divide by sqrt(D times the tokens of the segment), for stacks that norm before a layer.
    """

    bidirectional: ClassVar[bool] = True
    order: ClassVar[str] = "T log T"

    orthonormal: bool = False

    def project(self, x_BTD, x_BSD, seqs, past):
        return (constrain(self._split(x_BTD), "BTHP"),), None

    def _split(self, x_BTD: jax.Array) -> jax.Array:
        """Return x in heads, which a mesh lays out as it does those of other variants."""
        heads = math.gcd(self.heads, x_BTD.shape[-1])
        return x_BTD.reshape(*x_BTD.shape[:2], heads, -1)

    def mix(self, qkv, seqs, state):
        return self._scaled(forward(self._joined(qkv[0]), seq=seqs[0]), seqs[0]), None

    def refer(self, qkv, seqs):
        return self._scaled(reference(self._joined(qkv[0]), seq=seqs[0]), seqs[0])

    @staticmethod
    def _joined(x_BTHP: jax.Array) -> jax.Array:
        return constrain(x_BTHP.reshape(*x_BTHP.shape[:2], -1), "BTD")

    def _scaled(self, y_BTD: jax.Array, seq: Seq) -> jax.Array:
        if self.orthonormal:
            size_BT = runs(seq.segment_BT).size_BT.astype(jnp.float32)
            y_BTD = (y_BTD * jax.lax.rsqrt(size_BT * y_BTD.shape[-1])[..., None]).astype(y_BTD.dtype)
        return self._split(y_BTD)

    def finish(self, y_BTHP, x_BTD):
        y_BTD = self._joined(y_BTHP)
        if self.output_gate:
            y_BTD = y_BTD * jax.nn.sigmoid(self.linear("gate", x_BTD, "BTD,DF->BTF", x_BTD.shape[-1]))
        return constrain(y_BTD, "BTD")
