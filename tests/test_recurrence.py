"""The chunked recurrence: any chunk, decays from 1e-6 to 1, and the papers' equations by hand."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastformer.attention import VARIANTS, Context, decay, delta, make, rwkv
from fastformer.attention.mixer import Mixer
from fastformer.attention.recurrence import Tokens, loop, recur, unit_inverse
from fastformer.core.seq import Seq, whole

BATCH, TIME, GROUPS, SHARE, KEY, VALUE = 2, 90, 2, 2, 6, 5


def packed():
    segment, position = np.ones((BATCH, TIME), np.int32), np.tile(np.arange(TIME, dtype=np.int32), (BATCH, 1))
    segment[0, 33:], position[0, 33:] = 2, position[0, 33:] - 33
    segment[1, 40:47], segment[1, 47:], position[1, 47:] = 0, 4, position[1, 47:] - 47
    return Seq(jnp.asarray(segment), jnp.asarray(position))


def tokens(decays, rule):
    """Tokens whose decays are spread from 1e-6 to 1, most near 1; "forgets" has some of exp(-1000)."""
    keys = jax.random.split(jax.random.key(0), 6)
    normal = functools.partial(jax.random.normal, shape=(BATCH, TIME, GROUPS, KEY))
    q = jax.random.normal(keys[0], (BATCH, TIME, GROUPS, SHARE, KEY))
    k, v = normal(keys[1]), jax.random.normal(keys[2], (BATCH, TIME, GROUPS, VALUE))
    k /= jnp.linalg.norm(k, axis=-1, keepdims=True)
    width = {"none": 0, "head": 1, "channel": KEY}[decays.split()[0]]
    spread = jax.random.uniform(keys[3], (BATCH, TIME, GROUPS, width or 1)) ** 4
    log = -6.0 * jnp.log(10.0) * spread if width else None
    if "forgets" in decays:
        log = log.at[:, 5:25].set(-1000.0).at[:, 25:].multiply(0.1)
    strength = 2.0 * jax.random.uniform(keys[4], (BATCH, TIME, GROUPS, 1))
    if rule == "adds":
        return Tokens(q, k, v, log)
    if rule == "overwrites":
        return Tokens(q, k * strength, v, log, k if log is None else k * jnp.exp(log))
    return Tokens(q, normal(keys[5]), v, log, k, -k * strength / 2)


@pytest.mark.parametrize("size", [1, 2, 7, 64])
@pytest.mark.parametrize("entries", ["drawn", "one key written again and again"])
def test_the_inverse_of_a_unit_triangle(entries, size):
    """Value and gradient, as float64 has them; powers of a triangle of ones would lose all digits."""
    drawn, weight = np.random.default_rng(0).standard_normal((2, 3, 2, size, size))
    lower = np.tril(0.2 * drawn if entries == "drawn" else np.ones_like(drawn), -1)
    want = np.linalg.inv(np.eye(size) + lower)
    turned = np.swapaxes(want, -1, -2)
    pull = jax.jit(jax.value_and_grad(lambda x: jnp.sum(unit_inverse(x) * weight)))
    value, gradient = pull(lower.astype(np.float32))
    np.testing.assert_allclose(unit_inverse(lower.astype(np.float32)), want, atol=1e-6 * np.abs(want).max())
    np.testing.assert_allclose(value, np.sum(want * weight), rtol=1e-5, atol=1e-5)
    slope = -np.tril(turned @ weight @ turned, -1)
    np.testing.assert_allclose(gradient, slope, atol=1e-5 * max(1.0, np.abs(slope).max()))


@pytest.mark.parametrize("rule", ["adds", "overwrites", "removes and adds"])
@pytest.mark.parametrize("decays", ["none", "head", "channel", "head forgets", "channel forgets"])
def test_any_chunk_is_the_loop(decays, rule):
    given, seq = tokens(decays, rule), packed()
    weight = jnp.cos(jnp.arange(BATCH * TIME * GROUPS * SHARE * VALUE, dtype=jnp.float32))
    weight, real = weight.reshape(BATCH, TIME, -1, VALUE), (seq.segment_BT > 0)[..., None, None]

    def pull(run):
        """Return the gradient and the outputs that are not padding."""

        def weighted(given):
            y_BTHP = run(given) * real
            return jnp.sum(y_BTHP * weight), y_BTHP

        return jax.jit(jax.grad(weighted, has_aux=True))(given)

    want = pull(lambda t: loop(t, seq))
    for chunk in (1, 16, 64, TIME, None):
        got = pull(lambda t, chunk=chunk: recur(t, seq, None, chunk)[0])
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert np.isfinite(a).all()
            np.testing.assert_allclose(a, b, atol=5e-6 * np.abs(b).max(), rtol=0)


def one_head(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((7, *shape)) for shape in shapes]


def run(forward, *arrays):
    """Run a forward on one row and one head of float64 arrays [T, …]; return [T, P]."""
    given = [jnp.asarray(a, jnp.float32)[None, :, None] for a in arrays]
    return np.asarray(forward(*given, seq=whole(1, 7))[0])[0, :, 0]


def test_decay_is_its_equation():
    q, k, v, gate = one_head(0, (KEY,), (KEY,), (VALUE,), (KEY,))
    log = -np.abs(gate)
    want, state = [], np.zeros((KEY, VALUE))
    for t in range(7):
        state = np.exp(log[t])[:, None] * state + np.outer(k[t], v[t])
        want.append(state.T @ q[t] / np.sqrt(KEY))
    np.testing.assert_allclose(run(decay.forward, q, k, v, log), want, atol=1e-5)


def test_delta_rule_is_its_equation():
    """S_t = S_{t-1} alpha (I - beta k k^T) + beta v k^T (2412.06464, eq. 10), S of shape [P, K]."""
    q, k, v, gate, strength = one_head(1, (KEY,), (KEY,), (VALUE,), (1,), ())
    log, beta = -np.abs(gate), 1 / (1 + np.exp(-strength))
    want, state = [], np.zeros((VALUE, KEY))
    for t in range(7):
        unit = k[t] / np.linalg.norm(k[t])
        state = state * np.exp(log[t]) @ (np.eye(KEY) - beta[t] * np.outer(unit, unit))
        state += beta[t] * np.outer(v[t], unit)
        want.append(state @ q[t] / np.linalg.norm(q[t]) / np.sqrt(KEY))
    got = run(lambda q, k, v, log, beta, seq: delta.forward(q, k, v, beta, log, seq=seq), q, k, v, log, beta)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_rwkv7_is_its_equation():
    """S_t = S_{t-1} (diag(w) - u^T (a * u)) + v^T k with row vectors (2503.14456, eq. 16)."""
    r, k, v, gate, u, a = one_head(2, (KEY,), (KEY,), (VALUE,), (KEY,), (KEY,), (KEY,))
    log, u, a = -np.abs(gate), u / np.linalg.norm(u, axis=-1, keepdims=True), 1 / (1 + np.exp(-a))
    want, state = [], np.zeros((VALUE, KEY))
    for t in range(7):
        state = state @ (np.diag(np.exp(log[t])) - np.outer(u[t], a[t] * u[t])) + np.outer(v[t], k[t])
        want.append(state @ r[t])
    np.testing.assert_allclose(run(rwkv.forward, r, k, v, log, u, a), want, atol=1e-5)


def test_delta_product_of_one_step_is_delta():
    """And of two it is not: each step writes."""
    x, seq = jax.random.normal(jax.random.key(0), (1, 20, 12)), whole(1, 20)
    shared = {"heads": 2, "head_width": 6}
    one = make("delta", {"negative": True, "norm_gate": True}, shared)
    params = one.init(jax.random.key(1), x, seq)
    want = one.apply(params, x, seq)[0]
    got = make("delta_product", {"steps": 1}, shared).apply(params, x, seq)[0]
    np.testing.assert_allclose(got, want, atol=1e-6)
    two = make("delta_product", {"steps": 2}, shared)
    assert two.init(jax.random.key(1), x, seq)["params"]["key"]["weight"].value.shape == (12, 4, 6)


OWN_PROJECTIONS = [
    name
    for name, variant in VARIANTS.items()
    if variant.causal and variant.streaming and variant.project is not Mixer.project
]


@pytest.mark.parametrize(
    "name, span", [*((name, 4) for name in ("softmax", "linear", *OWN_PROJECTIONS)), ("rwkv7", 1)]
)
def test_a_short_convolution_streams(name, span):
    """Before mixers that have none of their own, over packed rows; more tokens and fewer than it spans."""
    shared = {"heads": 2, "head_width": 6, "positions": "none" if name == "hyena" else "rope", "length": TIME}
    mixer = make(name, VARIANTS[name].small, shared | {"short_conv": span})
    x, seq = jax.random.normal(jax.random.key(0), (BATCH, TIME, 12)), packed()
    params = mixer.init(jax.random.key(1), x, seq)
    apply = jax.jit(mixer.apply)
    want = apply(params, x, seq)[0]
    first = Seq(seq.segment_BT[:, :3], seq.position_BT[:, :3])
    alone = apply(params, x.at[:, 0].add(1.0)[:, :3], first)[0] - apply(params, x[:, :3], first)[0]
    assert span == 1 or np.abs(alone[:, 2]).max() > 1e-6
    state, parts, edges = mixer.init_state(BATCH, TIME), [], [0, 2, 4, 24, 44, 46, 66, TIME]
    for start, end in zip(edges, edges[1:]):
        piece = Seq(seq.segment_BT[:, start:end], seq.position_BT[:, start:end])
        y, state = apply(params, x[:, start:end], piece, state)
        parts.append(y)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), want, atol=3e-5)


def test_a_short_convolution_is_of_one_sequence():
    mixer = make("softmax", {}, {"heads": 2, "head_width": 6, "short_conv": 4})
    context = Context(jnp.zeros((1, 4, 12)), whole(1, 4))
    with pytest.raises(ValueError, match="short convolution needs self-attention"):
        mixer.init(jax.random.key(0), jnp.zeros((1, 4, 12)), whole(1, 4), None, context)


@pytest.mark.parametrize("name", ["softmax", "linear", "gla", "gated_delta", "aft"])
def test_biases_reach_neither_padding_nor_other_segments(name):
    """At padding keys and values are a bias, and not zero; the reference and NaN there tell nothing of it."""
    shared = {"heads": 2, "head_width": 6, "positions": "rope", "length": TIME, "bias": True}
    x, seq = jax.random.normal(jax.random.key(0), (BATCH, TIME, 12)), packed()
    mixer = make(name, VARIANTS[name].small, shared)
    params = mixer.init(jax.random.key(1), x, seq)
    assert params["params"]["out"]["bias"].value.shape == (12,)
    params = jax.tree.map(lambda a: a + 0.5, params)
    want = make(name, VARIANTS[name].small, shared | {"implementation": "reference"}).apply(params, x, seq)[0]
    padding = (seq.segment_BT == 0)[..., None]
    got = mixer.apply(params, jnp.where(padding, jnp.nan, x), seq)[0]
    np.testing.assert_allclose(got, want, atol=5e-5)
    assert padding.any() and not np.any(np.where(padding, got, 0.0)) and np.abs(got).max() > 0
