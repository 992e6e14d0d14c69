"""Beam search with a length penalty, in one compiled loop."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fastformer.decode.steps import GenerateConfig, decode_step, prefill

LOW = -1e30  # below any score; -inf would make NaN of 0 times it


class Beams(NamedTuple):
    """The search: beams that go on, and the best text that ended.

    Attributes:
      open_BK: log-probabilities of the beams that go on, float32.
      tokens_BKT: what they wrote. logits_BKV: of their next token. state: of the model, rows B K.
      ended_B: penalised score of the best that ended; ended_BT: what it wrote.
    """

    step: jax.Array
    open_BK: jax.Array
    tokens_BKT: jax.Array
    logits_BKV: jax.Array
    state: Any
    ended_B: jax.Array
    ended_BT: jax.Array


def penalty(tokens: jax.Array | int, alpha: float) -> jax.Array:
    """Return ``((5 + n) / 6)^alpha``, what log-probabilities are divided by (Wu et al. 2016, 1609.08144, 14).

    Args:
      tokens: n, written, the end included.
    """
    return ((5.0 + tokens) / 6.0) ** alpha


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def beam_search(model, options: GenerateConfig, end: int, params, tokens_BT, lengths_B) -> jax.Array:
    """Return the best continuation of each prompt that was found, [B, options.tokens], ``end`` after its end.

    ``options.beams`` go on at once. A text ends where its end is among as many likeliest continuations of
    all beams (as in fairseq: Ott et al. 2019, 1904.01038); what is cut off at the limit competes as it is.
    Prompts are padded right.
    """
    batch, width, limit = tokens_BT.shape[0], options.beams, options.tokens
    capacity = tokens_BT.shape[1] + limit
    logits_BV, state, position_B = prefill(model, params, tokens_BT, lengths_B, capacity, end)
    start = Beams(
        jnp.zeros((), jnp.int32),
        jnp.full((batch, width), LOW).at[:, 0].set(0.0),  # the beams are all one at first
        jnp.full((batch, width, limit), end, jnp.int32),
        jnp.repeat(logits_BV[:, None], width, axis=1),
        jax.tree.map(lambda x: jnp.repeat(x, width, axis=0), state),
        jnp.full((batch,), LOW),
        jnp.full((batch, limit), end, jnp.int32),
    )

    def hope(b: Beams) -> jax.Array:
        """Return the score that no open beam's can exceed, [B, K]; at the limit it is their score."""
        # Log-probabilities only fall, and the penalty is largest at the limit.
        return b.open_BK / penalty(limit, options.length_penalty)

    def unfinished(b: Beams) -> jax.Array:
        return (b.step < limit) & jnp.any(jnp.max(hope(b), axis=1) > b.ended_B)

    def step_on(b: Beams) -> Beams:
        wider = _extend(b, end, options.length_penalty)
        token_R = wider.tokens_BKT[:, :, b.step].reshape(-1)
        position_R = jnp.repeat(position_B, width) + b.step
        active_R = jnp.ones(token_R.shape, bool)
        logits_RV, state = decode_step(model, params, token_R, position_R, active_R, wider.state)
        logits_BKV = logits_RV.reshape(batch, width, -1)
        return wider._replace(step=b.step + 1, logits_BKV=logits_BKV, state=state)

    b = jax.lax.while_loop(unfinished, step_on, start)
    scores_BN = jnp.concatenate([b.ended_B[:, None], hope(b)], axis=1)
    texts_BNT = jnp.concatenate([b.ended_BT[:, None], b.tokens_BKT], axis=1)
    return _chosen(texts_BNT, jnp.argmax(scores_BN, axis=1)[:, None])[:, 0]


def _extend(b: Beams, end: int, alpha: float) -> Beams:
    """Return the beams with one more token each: the likeliest that go on, and the best that has ended."""
    batch, width, vocabulary = b.logits_BKV.shape
    sums_BKV = b.open_BK[..., None] + jax.nn.log_softmax(b.logits_BKV.astype(jnp.float32), axis=-1)
    # Each beam has one end, so that of twice as many candidates enough go on.
    sum_BN, choice_BN = jax.lax.top_k(sums_BKV.reshape(batch, -1), 2 * width)
    parent_BN, token_BN = choice_BN // vocabulary, choice_BN % vocabulary
    ends_BN = token_BN == end
    counts_BN = ends_BN & (jnp.arange(2 * width) < width)[None] & (sum_BN > LOW)
    score_BN = jnp.where(counts_BN, sum_BN / penalty(b.step + 1, alpha), LOW)
    best_B1 = jnp.argmax(score_BN, axis=1)[:, None]
    score_B = _chosen(score_BN, best_B1)[:, 0]
    text_BT = _chosen(b.tokens_BKT, _chosen(parent_BN, best_B1))[:, 0]  # ``end`` stands after what it wrote
    better_B = score_B > b.ended_B
    open_BK, which_BK = jax.lax.top_k(jnp.where(ends_BN, -jnp.inf, sum_BN), width)
    parent_BK, token_BK = _chosen(parent_BN, which_BK), _chosen(token_BN, which_BK)
    row_R = (jnp.arange(batch)[:, None] * width + parent_BK).reshape(-1)
    return b._replace(
        open_BK=jnp.maximum(open_BK, LOW),
        tokens_BKT=jax.lax.dynamic_update_index_in_dim(
            _chosen(b.tokens_BKT, parent_BK), token_BK, b.step, axis=2
        ),
        state=jax.tree.map(lambda x: x[row_R], b.state),
        ended_B=jnp.where(better_B, score_B, b.ended_B),
        ended_BT=jnp.where(better_B[:, None], text_BT, b.ended_BT),
    )


def _chosen(x_BN: jax.Array, index_BK: jax.Array) -> jax.Array:
    """Return what stands at the indices of each row, [B, K, ...]."""
    return jnp.take_along_axis(x_BN, index_BK.reshape(*index_BK.shape, *[1] * (x_BN.ndim - 2)), axis=1)
