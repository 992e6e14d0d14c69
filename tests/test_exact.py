"""Exact attention: what the laws, which take a variant at its ``small`` fields, do not see."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastformer.attention import Context, make
from fastformer.core.errors import FieldError
from fastformer.core.seq import Seq, whole

SHARED = {"heads": 4, "kv_heads": 2, "head_width": 8, "positions": "rope", "length": 64}
WIDTH, TIME = 16, 40
SEGMENT = jnp.asarray([[1] * 18 + [0] * 3 + [2] * 19, [3] * 40], jnp.int32)
POSITION = jnp.asarray([[*range(18), *[0] * 3, *range(19)], [*range(40)]], jnp.int32)
SEQ = Seq(SEGMENT, POSITION)


def inputs(seed: int = 0, time: int = TIME) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (2, time, WIDTH))


def layer(name: str, options: dict, **shared):
    """Return a mixer and its parameters, each away from its initial value."""
    mixer = make(name, options, SHARED | shared)
    variables = nn.unbox(jax.jit(mixer.init)(jax.random.key(0), inputs(time=2), whole(2, 2)))
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return mixer, jax.tree.unflatten(
        tree, [a + 0.1 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys)]
    )


def near(got, want, tolerance: float = 2e-5) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, np.abs(b).max()), rtol=0)


def value_and_gradients(mixer, variables, context=None):
    def loss(variables, x):
        y = mixer.apply(variables, x, SEQ, None, context)[0]
        return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)), y

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(variables, inputs())


def run(mixer, variables) -> jax.Array:
    return jax.jit(lambda variables: mixer.apply(variables, inputs(), SEQ)[0])(variables)


def fold(mixer, variables, cuts) -> np.ndarray:
    step = jax.jit(mixer.apply)
    state, parts, edges = mixer.init_state(2, TIME), [], [0, *cuts, TIME]
    for start, end in zip(edges, edges[1:]):
        seq = Seq(SEGMENT[:, start:end], POSITION[:, start:end])
        y, state = step(variables, inputs()[:, start:end], seq, state)
        parts.append(y)
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize(
    "options, shared",
    [({"query_rank": 5}, {"short_conv": 3, "output_gate": True}), ({}, {"kv_heads": 1})],
)
def test_latent_streams_with_every_option(options, shared):
    """The state holds latents, and decoding never expands them: the same outputs all the same."""
    mixer, variables = layer("latent", {"kv_rank": 6, "rope_width": 4} | options, **shared)
    want = run(mixer, variables)
    near(fold(mixer, variables, (1, 2, 14, 15, 27, 28)), want)


SUNK = [("softmax", {"learned_sinks": True}), ("local", {"learned_sinks": True, "window": 9})]


@pytest.mark.parametrize(
    "name, options, mode",
    [
        (*SUNK[0], {"bidirectional_mode": True}),
        (*SUNK[0], {"positions": "alibi", "soft_cap": 2.0}),
        (*SUNK[1], {}),
    ],
)
def test_learned_sinks_are_the_references(name, options, mode):
    mixer, variables = layer(name, options, **mode)
    fast, slow = (
        value_and_gradients(mixer.clone(implementation=form), variables) for form in ("auto", "reference")
    )
    near(fast, slow)
    assert all(np.abs(gradient).max() > 1e-2 for gradient in jax.tree.leaves(slow[0]))


@pytest.mark.parametrize("name, options", SUNK)
def test_learned_sinks_stream(name, options):
    mixer, variables = layer(name, options)
    near(fold(mixer, variables, (1, 2, 14, 15, 27, 28)), run(mixer, variables))


def test_learned_sinks_look_across():
    mixer, variables = layer("softmax", {"learned_sinks": True}, positions="none")
    context = Context(inputs(5, 20), whole(2, 20))
    forms = [mixer.clone(implementation=form) for form in ("auto", "reference")]
    near(*(value_and_gradients(form, variables, context) for form in forms))


def test_a_sink_that_draws_everything_leaves_nothing():
    mixer, variables = layer("softmax", {"learned_sinks": True})
    for score, least, most in ((60.0, 0.0, 1e-6), (-60.0, 1.0, np.inf)):
        variables["params"]["sink"] = jnp.full(4, score)
        assert least <= np.abs(run(mixer, variables)).max() <= most


def test_no_kernel_has_sinks():
    mixer, variables = layer("softmax", {"learned_sinks": True})
    with pytest.warns(UserWarning, match="cudnn cannot serve: it has no sinks"):
        got = run(mixer.clone(implementation="cudnn"), variables)
    near(got, run(mixer, variables))


@pytest.mark.parametrize("tokens, length, n", [(0, 64, 64), (5, 64, 5)])
def test_sigmoid_is_its_equation(tokens, length, n):
    """The sum over s of sigmoid(q_t.k_s / sqrt(K) - log n) v_s, in float64 (2409.04431, eq. 3)."""
    mixer = make("sigmoid", {"tokens": tokens}, SHARED | {"length": length})
    keys = jax.random.split(jax.random.key(3), 3)
    q, k, v = (2.0 * jax.random.normal(key, (1, 9, heads, 8)) for key, heads in zip(keys, (4, 2, 2)))
    got, _ = mixer.mix((q, k, v), (whole(1, 9),) * 2, None)
    q, k, v = (np.asarray(x[0], np.float64) for x in (q, k, v))
    want = np.zeros((9, 4, 8))
    for t, h in np.ndindex(9, 4):
        scores = k[: t + 1, h // 2] @ q[t, h] / np.sqrt(8)
        want[t, h] = (1 / (1 + n * np.exp(-scores))) @ v[: t + 1, h // 2]
    near(got[0], want)


def synthesised(parts: str, params: dict, x: np.ndarray, head: int) -> np.ndarray:
    """Return the scores of one head for tokens at positions 0, 1, …, in float64."""
    time, group, scores = len(x), head // 2, []
    for part in parts.split("+"):
        if part == "dense":
            hidden = x @ params["hidden"]["weight"][:, head] + params["hidden_bias"][head]
            outputs = params["dense"][:, group].T, params["dense_bias"][:, group]
            scores.append((np.maximum(hidden, 0) @ outputs[0] + outputs[1])[:, :time])
        elif part == "random":
            scores.append(
                (params["random_rows"][:, head] @ params["random_columns"][:, group].T)[:time, :time]
            )
        else:
            q, k = (x @ params[name]["weight"][:, at] for name, at in (("query", head), ("key", group)))
            scores.append(q @ k.T / np.sqrt(8))
    shares = np.exp(params.get("mixture", np.zeros(1)))
    return sum(share * score for share, score in zip(shares / shares.sum(), scores, strict=True))


@pytest.mark.parametrize("parts", ["dense", "random", "random+vanilla", "vanilla+dense"])
def test_synthesizer_is_its_equation_and_streams(parts):
    """softmax(alpha_1 S_1 + …) v, float64; S is W_2 relu(W_1 x + b_1) + b_2, R_1 R_2^T or q k^T / sqrt(K)."""
    mixer, variables = layer("synthesizer", {"parts": parts, "rank": 3}, positions="none")
    got = run(mixer, variables)
    near(fold(mixer, variables, (1, 2, 14, 15, 27, 28)), got)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    x, want = np.asarray(inputs()[1], np.float64), np.zeros((TIME, WIDTH))
    for head in range(4):
        scores = synthesised(parts, params, x, head)
        weights = np.tril(np.exp(scores - scores.max()))
        v = x @ params["value"]["weight"][:, head // 2]
        want += weights / weights.sum(axis=1, keepdims=True) @ v @ params["out"]["weight"][head]
    near(got[1], want)


def test_synthesizer_keeps_keys_only_where_it_has_them():
    for parts, width in (("dense+random", 0), ("random+vanilla", 8)):
        assert make("synthesizer", {"parts": parts}, SHARED).init_state(2, 5).key_BSGK.shape == (
            2,
            5,
            2,
            width,
        )


def test_rows_beyond_the_weights_are_refused():
    mixer = make("synthesizer", {}, SHARED)
    with pytest.raises(FieldError, match="length: 64 is not allowed"):
        jax.eval_shape(mixer.init, jax.random.key(0), inputs(time=65), whole(2, 65))


@pytest.mark.parametrize(
    "name, options, shared, field",
    [
        ("latent", {"kv_rank": -1}, {}, "kv_rank"),
        ("latent", {"query_rank": -1}, {}, "query_rank"),
        ("latent", {"rope_width": 3}, {}, "rope_width"),
        ("latent", {}, {"qk_norm": True}, "qk_norm"),
        ("differential", {}, {"heads": 3, "kv_heads": 1}, "heads"),
        ("differential", {}, {"kv_heads": 1}, "kv_heads"),
        ("sigmoid", {"tokens": -1}, {}, "tokens"),
        ("synthesizer", {"parts": "dense+rnadom"}, {}, "parts"),
        ("synthesizer", {"parts": "dense+dense"}, {}, "parts"),
        ("synthesizer", {"rank": 0}, {}, "rank"),
        ("synthesizer", {}, {"qk_norm": True}, "qk_norm"),
    ],
)
def test_bad_fields_are_refused(name, options, shared, field):
    with pytest.raises(FieldError, match=field):
        make(name, options, SHARED | shared)
