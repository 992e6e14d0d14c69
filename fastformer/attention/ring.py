"""Exact attention over rows whose time is split over devices.

Without a window it is Ring Attention (Liu et al. 2023, 2310.01889): queries stay, the keys and values of the
shards go round, and what a shard has found so far is joined with what it finds in the next ones by the log
of the total weight. The backward pass goes round as well, and takes the sums of the keys' gradients along,
so that no device ever holds more keys than its own and those under way. With a window a shard needs the
tokens just before it only, and gets no others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fastformer.attention.scores import Mask
from fastformer.attention.time_shards import TimeShards
from fastformer.core.seq import Seq

Keys = tuple[jax.Array, jax.Array, Seq]


class Part(NamedTuple):
    """Attention to some of the keys, within one device: hashable, so that it can be a static argument.

    Attributes:
      forward: ``(q_BTHK, k_BSGK, v_BSGP, seqs, mask) -> (y_BTHP float32, log_BTH)``, as
        blocked.attend_part has them.
      gradients: ``((q, k, v), seqs, mask, (y, log) of all keys, their cotangents) -> (dq, dk, dv)`` float32.
    """

    forward: Callable[..., tuple[jax.Array, jax.Array]]
    gradients: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def ring(
    part: Part,
    shards: TimeShards,
    mask: Mask,
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGP: jax.Array,
    seq: Seq,
) -> tuple[jax.Array, jax.Array]:
    """Return ``(y_BTHP, log_BTH)`` float32 of this shard's queries and the keys of all shards.

    Within time_shards.by_shard; the mask has no window. In S turns every device sends its keys and values S
    times to the next; a turn whose keys all come later is idle, so that with a causal mask the last shard
    has S turns to do and the first one.
    """
    return _forward(part, shards, mask, q_BTHK, k_BTGK, v_BTGP, seq)[0]


def _forward(part, shards, mask, q_BTHK, k_BTGK, v_BTGP, seq):
    beyond = _beyond(mask)

    def look(keys: Keys, mask: Mask) -> tuple[jax.Array, jax.Array]:
        return part.forward(q_BTHK, *keys[:2], (seq, keys[2]), mask)

    keys = (k_BTGK, v_BTGP, seq._replace(last_BT=None))
    following = shards.later(keys, around=True)
    found = look(keys, mask)

    def turn(carry: tuple, number: jax.Array) -> tuple[tuple, None]:
        keys, found = carry
        following = shards.later(keys, around=True)  # under way while these are looked at
        seen = _if_seen(shards, mask, number, lambda: _joined(found, look(keys, beyond)), lambda: found)
        return (following, seen), None

    (_, found), _ = jax.lax.scan(turn, (following, found), jnp.arange(1, shards.count))
    return found, (q_BTHK, k_BTGK, v_BTGP, seq, *found)


def _backward(part, shards, mask, saved, cotangents):
    q_BTHK, k_BTGK, v_BTGP, seq, *found = saved

    def gradients(keys: Keys, mask: Mask) -> tuple[jax.Array, ...]:
        return part.gradients((q_BTHK, *keys[:2]), (seq, keys[2]), mask, found, cotangents)

    keys, beyond = (k_BTGK, v_BTGP, seq._replace(last_BT=None)), _beyond(mask)
    dq, *dkeys = gradients(keys, mask)

    def turn(carry: tuple, number: jax.Array) -> tuple[tuple, None]:
        sums, keys = carry[:3], carry[3]
        # The sums go round with the keys that they belong to.
        keys, (dk, dv) = shards.later((keys, sums[1:]), around=True)
        sums = (sums[0], dk, dv)

        def add() -> tuple[jax.Array, ...]:
            return tuple(jnp.add(a, b) for a, b in zip(sums, gradients(keys, beyond)))

        return (*_if_seen(shards, mask, number, add, lambda: sums), keys), None

    (dq, dk, dv, _), _ = jax.lax.scan(turn, (dq, *dkeys, keys), jnp.arange(1, shards.count))
    dk, dv = shards.later((dk, dv), around=True)
    return dq.astype(q_BTHK.dtype), dk.astype(k_BTGK.dtype), dv.astype(v_BTGP.dtype), None


ring.defvjp(_forward, _backward)


def _beyond(mask: Mask) -> Mask:
    """Return the mask of the keys of another shard that is seen: all of them, but for what prefixes end."""
    return mask if mask.prefix else Mask(False)


def _if_seen(shards: TimeShards, mask: Mask, turn: jax.Array, then: Callable, otherwise: Callable) -> Any:
    """Return ``then()`` where the keys of this turn are of shards that this one can see."""
    earlier = mask.causal and not mask.prefix
    return jax.lax.cond(turn <= shards.index(), then, otherwise) if earlier else then()


def _joined(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Return the attention to the keys of both, from ``(y_BTHP, log_BTH)`` of each."""
    log_BTH = jnp.logaddexp(a[1], b[1])
    least = jnp.where(log_BTH > -jnp.inf, log_BTH, 0.0)
    shares = (jnp.exp(log - least)[..., None] for log in (a[1], b[1]))
    return sum(share * y for share, y in zip(shares, (a[0], b[0]))), log_BTH


class Shifted(NamedTuple):
    """A mask whose keys begin ``before`` tokens before its queries."""

    mask: Mask
    before: int

    @property
    def window(self) -> int:
        """Return the mask's."""
        return self.mask.window

    def visible(self, q_seq: Seq, k_seq: Seq) -> jax.Array:
        """Return the boolean mask [B, T, S]; positions are those of the row."""
        return self.mask.visible(q_seq, k_seq)

    def blocks(self, first_q: np.ndarray, first_k: np.ndarray, size: int) -> np.ndarray:
        """Return which key blocks can hold a key that a query block sees, [queries, keys] bool."""
        return self.mask.blocks(first_q, first_k - self.before, size)


def with_halo(
    shards: TimeShards, mask: Mask, k_BTGK: jax.Array, v_BTGP: jax.Array, seq: Seq, multiple: int = 1
) -> tuple[jax.Array, jax.Array, Seq, int]:
    """Return keys, values and Seq of this shard and of the tokens around it that a window reaches.

    Within time_shards.by_shard. The last result is how many tokens stand before the shard's own: the
    window's W - 1, up to the next ``multiple``.
    """
    reach = -(-(mask.window - 1) // multiple) * multiple

    def widen(x_BT: jax.Array) -> jax.Array:
        after = [] if mask.causal else [shards.halo(x_BT, reach, after=True)]
        return jnp.concatenate([shards.halo(x_BT, reach), x_BT, *after], axis=1)

    k_BSGK, v_BSGP, seq = jax.tree.map(widen, (k_BTGK, v_BTGP, seq))
    return k_BSGK, v_BSGP, seq, reach
