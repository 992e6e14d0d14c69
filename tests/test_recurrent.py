"""mLSTM, RG-LRU and FoX against their equations in float64, at the ends of their range."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastformer.attention import forgetting, make, mlstm, rg_lru
from fastformer.attention.segments import starts
from fastformer.core.errors import FieldError
from fastformer.core.seq import Seq

TIME, GROUPS, SHARE, KEYS, VALUES = 70, 2, 2, 4, 6
SEGMENT = np.array([3] * 25 + [0] * 2 + [1] * 37 + [2] * 5 + [0])
POSITION = np.arange(TIME) - np.maximum.accumulate(np.arange(TIME) * (np.diff(SEGMENT, prepend=0) != 0))
SEQ = Seq(*(np.array(x, np.int32)[None] for x in (SEGMENT, POSITION)))
SAME = (SEGMENT[:, None] == SEGMENT[None]) & (SEGMENT[:, None] > 0) & np.tri(TIME, dtype=bool)


def random(*shape, seed):
    return np.random.default_rng(seed).standard_normal((1, TIME, *shape)).astype(np.float32)


def close(got, want, tolerance):
    got, want = np.asarray(got, np.float64)[0, SEGMENT > 0], want[SEGMENT > 0]
    np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max(), rtol=0)


def spans(log):
    """Return the sum of log over (s, t], [T, T, …]."""
    total = np.cumsum(log.astype(np.float64), axis=0)
    return total[:, None] - total[None]


def dense_mlstm(q, k, v, write, log_keep):
    """Return the parallel form of one row, by a T x T matrix of what is left of each input."""
    y = np.zeros((TIME, GROUPS * SHARE, VALUES))
    q, k, v = (x[0].astype(np.float64) for x in (q, k, v))
    for head in range(GROUPS * SHARE):
        group = head // SHARE
        log = spans(log_keep[0, :, group]) + write[0, None, :, group]
        left = np.exp(np.where(SAME, log, -np.inf))
        scores = q[:, head] @ k[:, group].T / np.sqrt(KEYS) * left
        # The authors add their epsilon to what is divided by the strongest input.
        least = mlstm.EPSILON * np.maximum(left.max(axis=1), 1.0)
        y[:, head] = scores @ v[:, group] / (np.maximum(np.abs(scores.sum(axis=1)), 1.0) + least)[:, None]
    return y


@pytest.mark.parametrize("chunk", [1, 16, 64, TIME])
@pytest.mark.parametrize("spread, bias", [(1.0, 3.0), (1.0, -3.0), (20.0, 0.0)])
def test_mlstm_is_its_parallel_form(chunk, spread, bias):
    """Input gates from exp(-50) to exp(50): the stabiliser changes nothing."""
    q, k, v = random(4, KEYS, seed=0), random(GROUPS, KEYS, seed=1), random(GROUPS, VALUES, seed=2)
    write = spread * random(GROUPS, seed=3) - bias
    log_keep = np.array(jax.nn.log_sigmoid(random(GROUPS, seed=4) + bias))
    y, _ = jax.jit(mlstm.forward, static_argnames="chunk")(q, k, v, write, log_keep, seq=SEQ, chunk=chunk)
    close(y, dense_mlstm(q, k, v, write, log_keep), 1e-4)


def test_mlstm_counts_on_what_its_divisor_must():
    """Weak inputs are divided by 1, strong ones by their own sum."""
    q = k = np.ones((1, TIME, 1, KEYS), np.float32)
    v, keep = random(1, VALUES, seed=0), np.zeros((1, TIME, 1), np.float32)
    forward = jax.jit(mlstm.forward)
    weak, strong = (forward(q, k, v, keep + i, keep, seq=SEQ)[0] for i in (-12.0, 80.0))
    mean = np.stack([v[0, SAME[t]].mean(axis=0) if SEGMENT[t] else 0.0 * v[0, 0] for t in range(TIME)])
    close(strong, mean, 1e-4)
    count = SAME.sum(axis=1)[:, None, None] * np.exp(-12.0) * np.sqrt(KEYS)
    close(weak, mean * count, 1e-4)


@pytest.mark.parametrize("chunk", [1, 16, 64, TIME])
def test_rg_lru_is_its_sum_at_all_decays(chunk):
    """Decays from 1e-6 to 1, side by side."""
    x = random(GROUPS, VALUES, seed=0)
    log = (np.log(1e-6) * np.random.default_rng(1).random(x.shape) ** 8).astype(np.float32)
    log[:, ::3] = 0.0
    first = np.array([np.flatnonzero(SEGMENT == s)[0] if s else -1 for s in SEGMENT]) == np.arange(TIME)
    root = np.sqrt(np.maximum(-np.expm1(2.0 * log[0].astype(np.float64)), rg_lru.FLOOR))
    root = np.where(first[:, None, None], 1.0, root)
    left = np.exp(np.where(SAME[..., None, None], spans(log[0]), -np.inf))
    want = np.sum(left * (x[0] * root)[None], axis=1)
    h, state = jax.jit(rg_lru.forward, static_argnames="chunk")(x, log, seq=SEQ, chunk=chunk)
    close(h, want, 1e-6)
    close(rg_lru.reference(x, log, seq=SEQ), want, 1e-6)
    np.testing.assert_allclose(state.h_BGP[0], want[np.flatnonzero(SEGMENT)[-1]], atol=1e-5)


def test_rg_lru_starts_with_the_published_decays():
    decay = np.exp(-rg_lru.RATE * jax.nn.softplus(rg_lru.ring(jax.random.key(0), (4000,))))
    assert 0.9 <= decay.min() < 0.901 and 0.998 < decay.max() <= 0.9991
    assert abs(decay.mean() - 0.9495) < 0.002


def test_rg_lru_has_finite_gradients_at_a_decay_of_one():
    x, log = random(GROUPS, VALUES, seed=0), np.zeros((1, TIME, GROUPS, VALUES), np.float32)
    pull = jax.jit(jax.grad(lambda x, log: jnp.sum(rg_lru.forward(x, log, seq=SEQ)[0] ** 2), (0, 1)))(x, log)
    assert all(np.isfinite(leaf).all() for leaf in pull)


@pytest.mark.parametrize("block", [16, 128])
def test_forgetting_is_its_equation_at_all_gates(block):
    """Gates from 1e-6 to 1, side by side."""
    q, k, v = random(4, KEYS, seed=0), random(GROUPS, KEYS, seed=1), random(GROUPS, VALUES, seed=2)
    log = (np.log(1e-6) * np.random.default_rng(3).random((1, TIME, 4)) ** 4).astype(np.float32)
    log[:, ::3] = 0.0
    want = np.zeros((TIME, 4, VALUES))
    for head in range(4):
        scores = q[0, :, head].astype(np.float64) @ k[0, :, head // SHARE].T / np.sqrt(KEYS)
        weights = np.exp(np.where(SAME, scores + spans(log[0, :, head]), -np.inf))
        want[:, head] = weights @ v[0, :, head // SHARE] / np.maximum(weights.sum(axis=1), 1e-30)[:, None]
    y, _ = jax.jit(forgetting.forward, static_argnames="block")(q, k, v, log, seq=SEQ, block=block)
    close(y, want, 1e-5)


@pytest.mark.parametrize("time", [1, 30])
def test_forgetting_does_not_depend_on_what_was_forgotten_long_ago(time):
    """A sum of the logs alone, in float32, would be 0.01 off after as many tokens."""
    q, k, v = random(4, KEYS, seed=0), random(GROUPS, KEYS, seed=1), random(GROUPS, VALUES, seed=2)
    log = -0.1 * np.abs(random(4, seed=3))
    seq = Seq(np.ones((1, TIME), np.int32), np.arange(TIME, dtype=np.int32)[None])
    forward = jax.jit(forgetting.forward)
    first, rest = (
        jax.tree.map(lambda x, at=at: x[:, at], ((q, k, v, log), seq))
        for at in (slice(40), slice(40, 40 + time))
    )
    widths = {"key_width": KEYS, "value_width": VALUES}
    state = forgetting.init_state(1, TIME, jnp.float32, heads=4, kv_heads=GROUPS, **widths)
    state = forward(*first[0], seq=first[1], state=state)[1]
    total = state.total._replace(coarse=state.total.coarse - 2e5)
    later = state._replace(coarse_BSH=state.coarse_BSH - 2e5, total=total)
    want, got = (forward(*rest[0], seq=rest[1], state=start)[0] for start in (state, later))
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_starts():
    segment = jnp.asarray([[0, 5, 5, 0, 5, 2, 0], [3, 3, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]])
    first, last = starts(Seq(segment, segment), jnp.asarray([5, 1, 4]))
    want = [[0, 0, 0, 0, 0, 1, 0], [1, 0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(first, np.array(want, bool))
    np.testing.assert_array_equal(last, [2, 1, 4])


@pytest.mark.parametrize("field, value", [("forget", "tanh"), ("gate_cap", -1.0), ("value_expand", 0)])
def test_bad_values_are_refused(field, value):
    with pytest.raises(FieldError, match=field):
        make("mlstm", {field: value}, {"heads": 2, "head_width": 4})
