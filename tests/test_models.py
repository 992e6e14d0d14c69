"""The decoder: its parts, and what it refuses."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from fastformer import models
from fastformer.attention.positions import alibi_slopes, rope
from fastformer.core.errors import UserError
from fastformer.core.layers import LayerNorm, RMSNorm
from fastformer.core.seq import whole


def config(**model):
    c = base.get_config()
    c.model.layers, c.model.width, c.model.heads = 2, 16, 2
    for key, value in model.items():
        c.model[key] = value
    return c


def build(**model):
    made = models.build(config(**model), 11, 32)
    tokens = jax.random.randint(jax.random.key(1), (2, 8), 0, 11)
    return made, nn.unbox(made.init(jax.random.key(0), tokens, whole(2, 8))["params"]), tokens


@pytest.mark.parametrize(
    "model",
    [
        {"norm": "layer", "mlp": "gelu", "bias": True},
        {"norm_epsilon": 0.1},
        {"kv_heads": 1, "qk_norm": True, "output_gate": True},
        {"tied": False, "soft_cap": 5.0},
        {"positions": "alibi"},
        {"positions": "sinusoidal"},
        {"positions": "learned"},
        {"positions": "none", "head_width": 4},
        {"pattern": ("local", "softmax"), "attention": {"name": "local", "window": 2}},
    ],
    ids=str,
)
def test_every_option_changes_the_model(model):
    """Each option trains (a gradient in every weight), is causal, and is not swallowed."""
    made, params, tokens = build(**model)

    def total(params):
        return (made.apply({"params": params}, tokens, whole(2, 8))[0] ** 2).sum()

    for leaf in jax.tree.leaves(jax.grad(total)(params)):
        assert np.abs(leaf).max() > 0
    logits = made.apply({"params": params}, tokens, whole(2, 8))[0]
    changed = made.apply({"params": params}, tokens.at[:, 5].add(1) % 11, whole(2, 8))[0]
    np.testing.assert_array_equal(logits[:, :5], changed[:, :5])
    assert np.abs(logits[:, 5:] - changed[:, 5:]).max() > 1e-4
    plain, plain_params, _ = build()
    same_weights = jax.tree.structure(params) == jax.tree.structure(plain_params)
    if same_weights and jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, plain_params):
        assert np.abs(plain.apply({"params": params}, tokens, whole(2, 8))[0] - logits).max() > 1e-4


@pytest.mark.parametrize("positions", ["rope", "alibi", "sinusoidal", "learned"])
def test_positions_tell_order(positions):
    made, params, _ = build(positions=positions, layers=1)
    last = [
        made.apply({"params": params}, jnp.asarray([row]), whole(1, 3))[0][0, -1]
        for row in ([1, 2, 3], [2, 1, 3])
    ]
    assert np.abs(last[0] - last[1]).max() > 1e-5
    blind, params, _ = build(positions="none", layers=1)
    last = [
        blind.apply({"params": params}, jnp.asarray([row]), whole(1, 3))[0][0, -1]
        for row in ([1, 2, 3], [2, 1, 3])
    ]
    np.testing.assert_allclose(*last, atol=1e-6)


def test_rope_scores_depend_on_distance_alone():
    q, k = (jax.random.normal(jax.random.key(i), (1, 1, 1, 8)) for i in range(2))

    def score(i, j):
        at = [jnp.full((1, 1), n) for n in (i, j)]
        return float(jnp.sum(rope(q, at[0], 100.0) * rope(k, at[1], 100.0)))

    assert score(5, 2) == pytest.approx(score(105, 102), abs=1e-5)
    assert score(5, 2) != pytest.approx(score(5, 3), abs=1e-3)


def test_alibi_slopes_are_the_papers():
    np.testing.assert_allclose(alibi_slopes(8), [2.0**-i for i in range(1, 9)])
    np.testing.assert_allclose(alibi_slopes(3), [2.0**-4, 2.0**-8, 2.0**-2])


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
def test_norms_normalise(norm):
    x = 3.0 + 5.0 * jax.random.normal(jax.random.key(0), (2, 4, 64))
    y = norm().apply(nn.unbox(norm().init(jax.random.key(0), x)), x)
    np.testing.assert_allclose((y**2).mean(axis=-1), 1.0, atol=1e-3)
    assert (np.abs(y.mean(axis=-1)).max() < 1e-5) == (norm is LayerNorm)


def test_dropout_drops_only_in_training():
    made, params, tokens = build(dropout=0.5)
    keys = [jax.random.key(i) for i in range(2)]
    noisy = [
        made.apply({"params": params}, tokens, whole(2, 8), None, False, rngs={"dropout": key})[0]
        for key in keys
    ]
    assert np.abs(noisy[0] - noisy[1]).max() > 1e-3
    calm = [made.apply({"params": params}, tokens, whole(2, 8))[0] for _ in range(2)]
    np.testing.assert_array_equal(*calm)


@pytest.mark.parametrize(
    "model, message",
    [
        ({"heads": 3}, "config.model.heads: 3 does not divide config.model.width 16"),
        ({"heads": 4, "kv_heads": 3}, "config.model.kv_heads: 3 does not divide"),
        (
            {"attention": {"name": "sofmax"}},
            "config.model.attention.name: 'sofmax' is unknown; did you mean softmax?",
        ),
        ({"attention": {"name": "local", "window": 0}}, "config.model.attention.window: 0 is not allowed"),
        (
            {"attention": {"name": "local", "windw": 4}},
            "config.model.attention.windw: no such key; did you mean window?",
        ),
        ({"attention": {"name": "softmax", "window": 4}}, "config.model.attention.window: no such key"),
        (
            {"attention": {"name": "local", "window": 4.5}},
            "config.model.attention.window: 4.5 is not of type int",
        ),
        ({"attention": {"name": "linear"}, "positions": "alibi"}, "linear has no scores"),
        ({"pattern": ("local", "lokal")}, "config.model.pattern[1]: 'lokal' is unknown; did you mean local?"),
        (
            {"pattern": ("local",), "attention": {"name": "gla"}},
            "'gla' is in no layer of config.model.pattern",
        ),
        ({"positions": "roped"}, "config.model.positions: 'roped' is unknown; did you mean rope?"),
        ({"layers": -1}, "config.model.layers: -1 is not allowed; it must be 1 or more"),
        ({"dtype": "float64"}, "config.model.dtype: 'float64' is unknown"),
        ({"width": 6, "positions": "rope"}, "rope needs an even head width"),
        ({"dropout": 1.0}, "config.model.dropout: 1.0 is not allowed"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_in_one_line(model, message):
    with pytest.raises(UserError) as caught:
        models.build(config(**model), 11, 32)
    assert message in str(caught.value) and "\n" not in str(caught.value)
