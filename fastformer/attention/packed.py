"""Work on whole segments, however they are packed into rows: running softmax sums, and transforms in time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Tokens of the shortest slots, and how many times longer the slots of the next class are.
SLOT, GROWTH = 4, 4

LOWEST = -1e30

Transform = Callable[[jax.Array, jax.Array, Any], jax.Array]


class Runs(NamedTuple):
    """Where the segment of each token stands in its row; of no meaning at padding.

    Attributes:
      first_BT, last_BT: int32, indices of its first and last token.
    """

    first_BT: jax.Array
    last_BT: jax.Array

    @property
    def size_BT(self) -> jax.Array:
        """Return how many tokens it has."""
        return self.last_BT - self.first_BT + 1


def runs(segment_BT: jax.Array) -> Runs:
    """Return where segments stand."""
    index = jnp.arange(segment_BT.shape[1], dtype=jnp.int32)[None, :]
    changes = segment_BT[:, 1:] != segment_BT[:, :-1]
    starts = jnp.pad(changes, [(0, 0), (1, 0)], constant_values=True)
    ends = jnp.pad(changes, [(0, 0), (0, 1)], constant_values=True)
    first_BT = jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
    return Runs(first_BT, jax.lax.cummin(jnp.where(ends, index, index.max()), axis=1, reverse=True))


class Sums(NamedTuple):
    """``sum exp(logit - top) value``, ``sum exp(logit - top)`` and the largest logit, top.

    Attributes:
      top, total, value: float32, of like shape but for axes of size one.
    """

    top: jax.Array
    total: jax.Array
    value: jax.Array

    def plus(self, other: Sums) -> Sums:
        """Return the sums over what is in either."""
        top = jax.lax.stop_gradient(jnp.maximum(self.top, other.top))
        mine, others = jnp.exp(self.top - top), jnp.exp(other.top - top)
        total = self.total * mine + other.total * others
        return Sums(top, total, self.value * mine + other.value * others)

    def average(self) -> jax.Array:
        """Return the values averaged by their softmax weights; zero where there are none."""
        return self.value / jnp.where(self.total > 0, self.total, 1.0)


def running_sums(
    logit: jax.Array, value: jax.Array, segment_BT: jax.Array, before: tuple[Sums, jax.Array] | None = None
) -> Sums:
    """Return the softmax sums over each token and those before it in its segment, [B, T, …].

    Args:
      logit: [B, T, …] float32; value: of like shape but for axes of size one.
      before: sums [B, …] that the rows go on from, and the segment_B that these belong to.
    """
    shape = segment_BT.shape + (1,) * (value.ndim - 2)
    previous_B1 = jnp.zeros_like(segment_BT[:, :1]) if before is None else before[1][:, None]
    previous_BT = jnp.concatenate([previous_B1, segment_BT[:, :-1]], axis=1)
    real = (segment_BT > 0).reshape(shape)
    starts = real & (segment_BT != previous_BT).reshape(shape)
    peak = jnp.where(real, jax.lax.stop_gradient(logit), LOWEST)
    if before is not None:
        old = jax.lax.stop_gradient(before[0].top)[:, None]
        peak = peak.at[:, :1].max(jnp.where(starts[:, :1], LOWEST, old))

    def higher(left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]):
        return left[0] | right[0], jnp.where(right[0], right[1], jnp.maximum(left[1], right[1]))

    _, top = jax.lax.associative_scan(higher, (jnp.broadcast_to(starts, peak.shape), peak), axis=1)
    weight = jnp.where(real, jnp.exp(jnp.where(real, logit - top, 0.0)), 0.0)
    first = jnp.full_like(top[:, :1], LOWEST) if before is None else old
    earlier = jnp.concatenate([first, top[:, :-1]], axis=1)
    left = jnp.where(starts, 0.0, jnp.exp(jnp.minimum(earlier - top, 0.0)))
    total, value = weight, weight * jnp.where(real, value, 0.0)
    if before is not None:
        total = total.at[:, :1].add(left[:, :1] * before[0].total[:, None])
        value = value.at[:, :1].add(left[:, :1] * before[0].value[:, None])

    def go_on(one: tuple[jax.Array, ...], two: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return one[0] * two[0], one[1] * two[0] + two[1], one[2] * two[0] + two[2]

    _, total, value = jax.lax.associative_scan(go_on, (left, total, value), axis=1)
    return Sums(top, total, value)


def take(values: Any, index_BN: jax.Array) -> Any:
    """Return ``values`` [B, T, …], each leaf, at indices of time; those below 0 give whatever is first."""

    def one(x: jax.Array) -> jax.Array:
        index = jnp.maximum(index_BN, 0).reshape(index_BN.shape + (1,) * (x.ndim - 2))
        return jnp.take_along_axis(x, index, axis=1)

    return jax.tree.map(one, values)


def per_segment(transform: Transform, x_BTR: jax.Array, shared: Any, segment_BT: jax.Array) -> jax.Array:
    """Return ``transform`` of each segment by itself, [B, T, R], zero at padding.

    Segments are moved to slots of their own, of a few lengths; a length that no segment has costs nothing.
    So T tokens cost as much as one segment of them at best, GROWTH times that at worst, and in between
    they never cost the square of T. What is kept for the gradient is ``x`` and ``shared``.

    Args:
      transform: maps ``(x_BNCR, size_BN, shared)`` to ``y_BNCR``: N slots of C tokens, the first ``size``
        of them of one segment and zeros behind; y behind is not read. A static function.
      shared: arrays that every segment is transformed by.
    """
    return _per_segment(transform, x_BTR, shared, segment_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _per_segment(transform: Transform, x_BTR: jax.Array, shared: Any, segment_BT: jax.Array) -> jax.Array:
    y_BTR = jnp.zeros_like(x_BTR)
    for slots in _classes(segment_BT):

        def apply(x_BTR: jax.Array, shared: Any, slots: Slots = slots) -> jax.Array:
            return slots.back(transform(slots.fill(x_BTR), slots.size_BN, shared))

        y_BTR += jax.lax.cond(slots.used, apply, lambda x, _: jnp.zeros_like(x), x_BTR, shared)
    return y_BTR


def _save(transform: Transform, x_BTR: jax.Array, shared: Any, segment_BT: jax.Array):
    return _per_segment(transform, x_BTR, shared, segment_BT), (x_BTR, shared, segment_BT)


def _pull(transform: Transform, saved: tuple, dy_BTR: jax.Array) -> tuple:
    x_BTR, shared, segment_BT = saved
    gradients = jax.tree.map(jnp.zeros_like, (x_BTR, shared))
    for slots in _classes(segment_BT):

        def apply(x_BTR: jax.Array, shared: Any, dy_BTR: jax.Array, slots: Slots = slots) -> tuple:
            _, pull = jax.vjp(lambda x, w: transform(x, slots.size_BN, w), slots.fill(x_BTR), shared)
            dx_BNCR, dshared = pull(slots.fill(dy_BTR))
            return slots.back(dx_BNCR), dshared

        def nothing(x_BTR: jax.Array, shared: Any, dy_BTR: jax.Array) -> tuple:
            return jax.tree.map(jnp.zeros_like, (x_BTR, shared))

        new = jax.lax.cond(slots.used, apply, nothing, x_BTR, shared, dy_BTR)
        gradients = jax.tree.map(jnp.add, gradients, new)
    return *gradients, None


_per_segment.defvjp(_save, _pull)


class Slots(NamedTuple):
    """The segments of one class of lengths.

    Attributes:
      first_BN, size_BN: int32, where in its row a slot's segment begins and how long it is; 0 if it has none.
      place_BT: int32, N C + 1 places of which each token of the class has its own, any other token -1.
      length: C.
      used: whether any row has a segment of this class.
    """

    first_BN: jax.Array
    size_BN: jax.Array
    place_BT: jax.Array
    length: int
    used: jax.Array

    def fill(self, x_BTR: jax.Array) -> jax.Array:
        """Return the slots' tokens, [B, N, C, R], zeros behind a segment's end."""
        within = jnp.arange(self.length)[None, None, :]
        index_BNC = jnp.minimum(self.first_BN[:, :, None] + within, x_BTR.shape[1] - 1)
        taken = take(x_BTR, index_BNC.reshape(len(x_BTR), -1)).reshape(*index_BNC.shape, -1)
        return jnp.where((within < self.size_BN[:, :, None])[..., None], taken, 0.0)

    def back(self, y_BNCR: jax.Array) -> jax.Array:
        """Return what the slots hold, at the tokens' own places, [B, T, R]; zero at all other tokens."""
        flat = y_BNCR.reshape(len(y_BNCR), -1, y_BNCR.shape[-1])
        return jnp.where((self.place_BT >= 0)[..., None], take(flat, self.place_BT), 0.0)


def _classes(segment_BT: jax.Array) -> list[Slots]:
    time = segment_BT.shape[1]
    where = runs(segment_BT)
    index = jnp.arange(time, dtype=jnp.int32)[None, :]
    classes, below, length = [], 0, min(SLOT, time)
    while below < time:
        inside_BT = (segment_BT > 0) & (where.size_BT > below) & (where.size_BT <= length)
        starts_BT = inside_BT & (where.first_BT == index)
        first_BN = jnp.sort(jnp.where(starts_BT, index, time), axis=1)[:, : time // (below + 1)]
        size_BN = jnp.where(first_BN < time, take(where.size_BT, jnp.minimum(first_BN, time - 1)), 0)
        slot_BT = jnp.cumsum(starts_BT.astype(jnp.int32), axis=1) - 1
        place_BT = jnp.where(inside_BT, slot_BT * length + index - where.first_BT, -1)
        classes.append(Slots(first_BN, size_BN, place_BT, length, jnp.any(inside_BT)))
        below, length = length, min(length * GROWTH, time)
    return classes
