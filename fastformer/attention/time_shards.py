"""Rows whose time is split over devices: one shard's view of them, and what it gets from its neighbours.

Layers name letters, never mesh axes: time is split where the letter T is, by the configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from fastformer.core.mesh import layout, shards


class TimeShards(NamedTuple):
    """The shards of a row, in order of time; the methods are for use within ``by_shard``.

    Attributes:
      axes: of the mesh.
      count: of shards.
    """

    axes: tuple[str, ...]
    count: int

    def index(self) -> jax.Array:
        """Return the place of this shard, int32."""
        return jax.lax.axis_index(self.axes)

    def later(self, tree: Any, by: int = 1, around: bool = False) -> Any:
        """Return what the shard ``by`` places before this one has; zeros where there is none.

        Args:
          around: the last shards are before the first; ``by`` may then be negative.
        """
        pairs = [(i, (i + by) % self.count) for i in range(self.count) if around or 0 <= i + by < self.count]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axes, pairs), tree)

    def halo(self, x_BT: jax.Array, tokens: int, after: bool = False) -> jax.Array:
        """Return the ``tokens`` before this shard's (or after them), [B, tokens, …]; zeros beyond the row."""
        sign, parts, missing = (-1 if after else 1), [], tokens
        while missing > 0:
            size = min(missing, x_BT.shape[1])
            edge = x_BT[:, :size] if after else x_BT[:, x_BT.shape[1] - size :]
            parts.append(self.later(edge, sign * (len(parts) + 1)))
            missing -= size
        return jnp.concatenate(parts if after else parts[::-1], axis=1) if parts else x_BT[:, :0]

    def segments(self, segment_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the segment of the last real token before this shard (0: none), and of the row's, [B]."""
        index_BT = jnp.where(segment_BT > 0, jnp.arange(segment_BT.shape[1])[None, :], 0)
        last_B1 = jnp.take_along_axis(segment_BT, index_BT.max(axis=1, keepdims=True), axis=1)
        last_SB = jax.lax.all_gather(last_B1[:, 0], self.axes)
        place_S1 = jnp.arange(1, self.count + 1)[:, None]

        def latest(upto: jax.Array | int) -> jax.Array:
            place_1B = jnp.where((last_SB > 0) & (place_S1 <= upto), place_S1, 0).max(axis=0, keepdims=True)
            found_B = jnp.take_along_axis(last_SB, jnp.maximum(place_1B - 1, 0), axis=0)[0]
            return jnp.where(place_1B[0] > 0, found_B, 0)

        return latest(self.index()), latest(self.count)

    def passed(
        self, end: jax.Array, transfer: jax.Array, through: Callable[[jax.Array, jax.Array], jax.Array]
    ) -> jax.Array:
        """Return the state that comes into this shard; each makes ``through(transfer, state) + end`` of it.

        Args:
          through: ``(transfer, state) -> state``, linear; of two transfers it is the one after the other.
        """
        step = 1
        while step < self.count:  # what 2 step shards do, from what the nearer half does and the other
            before = self.later((end, transfer), step)
            end, transfer = end + through(transfer, before[0]), through(transfer, before[1])
            step *= 2
        return self.later(end)

    def of_last(self, x: jax.Array) -> jax.Array:
        """Return what the last shard has, to all."""
        return jax.lax.psum(jnp.where(self.index() == self.count - 1, x, 0.0), self.axes)


def time_shards(batch: int, time: int) -> TimeShards | None:
    """Return how rows [B, T] are split in time on the mesh in use; None where they are whole."""
    axes = layout("BT", (batch, time))[1]
    return TimeShards(axes, shards(axes)) if axes else None


def by_shard(
    fn: Callable[..., Any],
    letters: tuple[str, ...],
    out: tuple[str, ...],
    args: tuple[Any, ...],
    over: tuple[str, ...] = (),
) -> Any:
    """Return ``fn(*args)``, run by every device on its shards: what the compiler cannot split by itself.

    Args:
      letters: of each argument's axes; "." is an axis that all see whole, as is one of size 1.
      out: the same of each result, whose axes are split as those of the arguments are.
      over: mesh axes that alone are split so, and the compiler splits the others; () is all.
    """
    sizes: dict[str, int] = {}
    for spelt, x in zip(letters, args, strict=True):
        for letter, size in zip(spelt, x.shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))

    def spec(spelt: str, whole: tuple[int, ...] = ()) -> PartitionSpec:
        spelt = "".join("." if axis in whole else letter for axis, letter in enumerate(spelt))
        axes = layout(spelt, tuple(sizes.get(letter, 1) for letter in spelt))
        return PartitionSpec(*(names if names and (not over or names == over) else None for names in axes))

    given = tuple(
        spec(spelt, tuple(axis for axis, size in enumerate(x.shape) if size == 1))
        for spelt, x in zip(letters, args)
    )
    # The laws check the results; a check of what varies over which axes would need casts in every scan.
    outs = tuple(spec(spelt) for spelt in out)
    options = {"axis_names": set(over)} if over else {}
    return jax.shard_map(fn, in_specs=given, out_specs=outs, check_vma=False, **options)(*args)
