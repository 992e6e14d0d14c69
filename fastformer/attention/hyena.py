"""Hyena: gates and long convolutions with implicit filters (Poli et al. 2023, 2302.10866)."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastformer.attention.mixer import Mixer
from fastformer.attention.packed import per_segment
from fastformer.attention.scores import Mask
from fastformer.attention.segments import starts
from fastformer.attention.short_conv import windows
from fastformer.core.errors import require
from fastformer.core.layers import zero_padding
from fastformer.core.seq import Seq

# A filter falls to a hundredth within these shares of ``length``, from the first channel to the last.
SLOW, FAST, TARGET = 1.5, 0.3, 0.01
BLOCK = 32  # the most tokens that are convolved by products


class Filter(NamedTuple):
    """Weights of the network that makes the filters: F its width, R channels, L convolutions.

    Attributes:
      enter_EF: of the E features of a distance; frequency_F: of its sines.
      inner_LFF: of its further layers; bias_LF: of all of them but the last.
      leave_FLR: of its last layer; skip_LR: of what goes past a convolution.
    """

    enter_EF: jax.Array
    frequency_F: jax.Array
    inner_LFF: jax.Array
    bias_LF: jax.Array
    leave_FLR: jax.Array
    skip_LR: jax.Array


class HyenaState(NamedTuple):
    """What has entered each long convolution; in bytes, B S L R of dtype + 4 B.

    Attributes:
      input_BSLR: by position in the segment; zero where there was no token yet.
      segment_B: int32, the segment; 0 is none.
    """

    input_BSLR: jax.Array
    segment_B: jax.Array


def filters(weights: Filter, count: int, length: int) -> jax.Array:
    """Return the filters at distances 0 to count - 1, [count, L, R] float32 (2302.10866, section 3.3).

    ``window(t) network(t / length, cos, sin)``, with sines for activations.

    Args:
      length: the distance that counts as 1.
    """
    bands = (len(weights.enter_EF) - 1) // 2
    t_T1 = jnp.arange(count, dtype=jnp.float32)[:, None]
    part_T1 = t_T1 / max(length - 1, 1)
    angle_TE = t_T1 * (2 * math.pi / length) * jnp.linspace(1e-4, bands - 1, bands)[None]
    x_TF = jnp.concatenate([part_T1, jnp.cos(angle_TE), -jnp.sin(angle_TE)], axis=1)
    layers = (weights.enter_EF, *weights.inner_LFF)
    for weight, bias_F in zip(layers, weights.bias_LF, strict=True):
        x_TF = jnp.sin(weights.frequency_F[None] * (x_TF @ weight + bias_F[None]))
    rate_R = jnp.linspace(-math.log(TARGET) / SLOW, -math.log(TARGET) / FAST, weights.skip_LR.shape[1])
    window_TR = jnp.exp(-part_T1 * rate_R[None])
    return jnp.einsum("TF,FLR->TLR", x_TF, weights.leave_FLR) * window_TR[:, None]


def reference(parts: tuple[jax.Array, ...], weights: Filter, *, seq: Seq, length: int) -> jax.Array:
    """Return ``z_{n+1} = x_n (h_n * z_n)``, [B, T, H, P] float32, by sums over all pairs (2302.10866, eq. 4).

    Args:
      parts: ``(x_N, …, x_1, v)``. The first of the N convolutions is the short one before all parts.
    """
    *gates, z = (zero_padding(part, seq).astype(jnp.float32) for part in parts)
    shape = z.shape
    h_TLR = filters(weights, shape[1], length)
    visible_BTS1 = Mask(causal=True).visible(seq, seq)[..., None]
    time = jnp.arange(shape[1])
    distance_TS = jnp.maximum(time[:, None] - time[None, :], 0)
    for n, gate in enumerate(reversed(gates[1:])):
        z = (gate * z).reshape(*shape[:2], -1)
        seen_BTSR = jnp.where(visible_BTS1, h_TLR[distance_TS, n][None], 0.0)
        z = jnp.sum(seen_BTSR * z[:, None], axis=2) + weights.skip_LR[n][None, None] * z
        z = z.reshape(shape)
    return gates[0] * z


def forward(
    parts: tuple[jax.Array, ...], weights: Filter, *, seq: Seq, length: int, state: HyenaState | None = None
) -> tuple[jax.Array, HyenaState]:
    """Return ``(y_BTHP, state)`` in O(T log² T) by Fourier transforms; a token costs O(S R) from S slots.

    Args:
      parts: ``(x_N, …, x_1, v)``.
      length: the distance that filters take as 1, and the slots of the state of a call without one.
    """
    *gates, z = (zero_padding(part, seq) for part in parts)
    batch, time, dtype, shape = z.shape[0], z.shape[1], z.dtype, z.shape
    slots = max(length, time) if state is None else state.input_BSLR.shape[1]
    h_TLR = filters(weights, max(time, 0 if state is None else slots), length)
    entered = []
    for n, gate in enumerate(reversed(gates[1:])):
        z_BTR = (gate * z).reshape(batch, time, -1)
        entered.append(z_BTR)
        new_BTR = z_BTR.astype(jnp.float32)
        y_BTR = per_segment(_convolve, new_BTR, h_TLR[:time, n], seq.segment_BT)
        y_BTR += weights.skip_LR[n][None, None] * new_BTR
        if state is not None:
            past_BSR = state.input_BSLR[:, :, n].astype(jnp.float32)
            goes_on = (seq.segment_BT > 0) & (seq.segment_BT == state.segment_B[:, None])
            from_past = _from_past(past_BSR, h_TLR[:slots, n], seq.position_BT)
            y_BTR += jnp.where(goes_on[..., None], from_past, 0.0)
        z = y_BTR.astype(dtype).reshape(shape)
    if state is None:
        widths = {"convolutions": len(entered), "features": shape[2] * shape[3]}
        state = init_state(batch, slots, dtype, **widths)
    return gates[0] * z, _written(state, jnp.stack(entered, axis=2), seq)


def _convolve(x_BNCR: jax.Array, size_BN: jax.Array, h_TR: jax.Array) -> jax.Array:
    """Return ``sum_{s <= t} h_{t - s} x_s`` of each slot: products within blocks, transforms between them.

    A transform of the whole slot would be quicker, but its rounding would reach back in time. Here a block
    is transformed only into the block after it, blocks of twice the size at each step: O(C log² C).
    """
    length = x_BNCR.shape[2]
    doublings = max(0, math.ceil(math.log2(length / BLOCK)))
    block = -(-length // (1 << doublings))
    total = block << doublings
    x_BNCR = jnp.pad(x_BNCR, [(0, 0), (0, 0), (0, total - length), (0, 0)])
    h_TR = jnp.pad(h_TR[:length], [(0, total - length), (0, 0)])
    index = jnp.arange(block)
    distance = index[:, None] - index[None, :]
    near_CSR = jnp.where((distance >= 0)[..., None], h_TR[jnp.maximum(distance, 0)], 0.0)
    parts = x_BNCR.reshape(*x_BNCR.shape[:2], -1, block, x_BNCR.shape[3])
    y_BNCR = jnp.einsum("BNTSR,CSR->BNTCR", parts, near_CSR).reshape(x_BNCR.shape)
    while block < total:
        pairs = x_BNCR.reshape(*x_BNCR.shape[:2], -1, 2 * block, x_BNCR.shape[3])
        # Of period 2 C: what wraps around falls on the first block, which is not read.
        spectrum = jnp.fft.rfft(h_TR[: 2 * block], axis=0)[None, None, None]
        over = jnp.fft.rfft(pairs[:, :, :, :block], 2 * block, axis=3) * spectrum
        over = jnp.fft.irfft(over, 2 * block, axis=3)[:, :, :, block:]
        y_BNCR += jnp.pad(over, [(0, 0)] * 3 + [(block, 0), (0, 0)]).reshape(x_BNCR.shape)
        block *= 2
    return y_BNCR[:, :, :length]


def _from_past(past_BSR: jax.Array, h_SR: jax.Array, position_BT: jax.Array) -> jax.Array:
    """Return what the slots give to tokens at these positions, [B, T, R]."""
    slots = len(h_SR)
    if position_BT.shape[1] == 1:
        distance_BS = position_BT - jnp.arange(slots)[None]
        h_BSR = jnp.where((distance_BS > 0)[..., None], h_SR[jnp.clip(distance_BS, 0, slots - 1)], 0.0)
        return jnp.einsum("BSR,BSR->BR", past_BSR, h_BSR)[:, None]
    whole_BSR = _convolve(past_BSR[:, None], jnp.zeros(()), h_SR)[:, 0]
    index = jnp.clip(position_BT, 0, slots - 1)[..., None]
    return jnp.take_along_axis(whole_BSR, index, axis=1)


def _written(state: HyenaState, new_BTLR: jax.Array, seq: Seq) -> HyenaState:
    """Return the state with the tokens of each row's last segment at their positions."""
    last_B = starts(seq, state.segment_B)[1]
    same_B = last_B == state.segment_B
    kept = jnp.where(same_B.reshape(-1, 1, 1, 1), state.input_BSLR, jnp.zeros((), state.input_BSLR.dtype))
    stays = (seq.segment_BT > 0) & (seq.segment_BT == last_B[:, None])
    slot_BT = jnp.where(stays, seq.position_BT, kept.shape[1])
    rows = jnp.arange(len(kept))[:, None]
    return HyenaState(kept.at[rows, slot_BT].set(new_BTLR.astype(kept.dtype), mode="drop"), last_B)


def init_state(
    batch: int, capacity: int, dtype: jnp.dtype, *, convolutions: int, features: int
) -> HyenaState:
    """Return an empty state: B capacity L R elements of dtype and 4 B bytes."""
    empty = jnp.zeros((batch, capacity, convolutions, features), dtype)
    return HyenaState(empty, jnp.zeros((batch,), jnp.int32))


class Hyena(Mixer):
    """Gated long convolutions: O(T log² T) to train, a state of all that entered them.

    As published, where order 2 (here ``depth``) has one long convolution, the short one taking the place of
    the first; but without biases in projections and short convolution, and with the features of distances
    fixed.
    There are no keys: ``kv_heads``, ``qk_norm`` and ``positions`` do nothing, and the channels of all heads
    have filters of their own. Decoding is not its strength: a token costs O(S), and its filters anew; of
    more tokens than the state has slots, the further ones are not remembered.

    Attributes:
      depth: N, gates; N - 1 long convolutions.
      filter_width: of the network that makes the filters.
      filter_layers: layers of it before the last.
      filter_features: of a distance, that enter it: one, and a cosine and a sine each band.
      frequency: of its sines at first.
    """

    causal: ClassVar[bool] = True
    streaming: ClassVar[bool] = True
    rotary: ClassVar[bool] = False
    order: ClassVar[str] = "T log^2 T"
    convolution: ClassVar[int] = 3
    small: ClassVar[dict] = {"depth": 3, "filter_width": 16, "filter_features": 9}

    depth: int = 2
    filter_width: int = 64
    filter_layers: int = 3
    filter_features: int = 33
    frequency: float = 14.0

    def __post_init__(self):
        require(self.depth >= 2, "depth", self.depth, "2 or more")
        odd = self.filter_features >= 3 and self.filter_features % 2 == 1
        require(odd, "filter_features", self.filter_features, "an odd number, 3 or more")
        for field in ("filter_layers", "filter_width"):
            require(getattr(self, field) >= 1, field, getattr(self, field), "1 or more")
        super().__post_init__()

    def project(self, x_BTD, x_BSD, seqs, past):
        names = [f"gate_{n}" for n in range(self.depth, 0, -1)] + ["value"]
        spec = "BTD,DHP->BTHP"
        parts = [self.linear(name, x_BTD, spec, self.heads, self.head_width) for name in names]
        if self.conv_width:
            flat_BTR = jnp.concatenate([part.reshape(*part.shape[:2], -1) for part in parts], axis=-1)
            # Not ``ShortConv``: that one ends in a SiLU.
            init = nn.with_logical_partitioning(nn.initializers.normal(self.conv_width**-0.5), ("W", "R"))
            taps_WR = self.param("taps", init, (self.conv_width, flat_BTR.shape[-1]))
            window, past = windows(flat_BTR, seqs[0], self.conv_width, past)
            mixed = sum(x.astype(jnp.float32) * w[None, None] for x, w in zip(window, taps_WR))
            split = jnp.split(mixed.astype(flat_BTR.dtype), len(parts), axis=-1)
            parts = [new.reshape(old.shape) for new, old in zip(split, parts)]
        return tuple(parts), past

    def past_features(self):
        return max(self.conv_width - 1, 0), (self.depth + 1) * self.heads * self.head_width

    def gates(self, x_BTD, seq):
        require(self.length >= 1, "length", self.length, "the most tokens of a row, which filters take as 1")
        width, layers, enter = self.filter_width, self.filter_layers, self.filter_features
        convolutions, features = self.depth - 1, self.heads * self.head_width

        def uniform(fan_in: int):
            bound = fan_in**-0.5
            return lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)

        def weight(name: str, init: Any, letters: tuple, *shape: int) -> jax.Array:
            return self.param(f"filter_{name}", nn.with_logical_partitioning(init, letters), shape)

        made = Filter(
            weight("enter", uniform(enter), (None, None), enter, width),
            weight("frequency", nn.initializers.constant(self.frequency), (None,), width),
            weight("inner", uniform(width), (None, None, None), layers - 1, width, width),
            weight("bias", uniform(width), (None, None), layers, width),
            weight("leave", uniform(width), (None, None, "R"), width, convolutions, features),
            weight("skip", nn.initializers.normal(1.0), (None, "R"), convolutions, features),
        )
        return (made,)

    def mix(self, qkv, seqs, state):
        return forward(qkv[:-1], qkv[-1], seq=seqs[0], length=self.length, state=state)

    def refer(self, qkv, seqs):
        return reference(qkv[:-1], qkv[-1], seq=seqs[0], length=self.length)

    def empty(self, batch, capacity, dtype):
        sizes = {"convolutions": self.depth - 1, "features": self.heads * self.head_width}
        return init_state(batch, capacity, dtype, **sizes)
