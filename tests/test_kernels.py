"""Kernel attention against its equations in float64, token by token; what the laws do not see."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastformer.attention import based, cosformer, hedgehog, linear, make, performer, random_features
from fastformer.attention.linear import average
from fastformer.core.errors import FieldError
from fastformer.core.seq import Seq, whole

SHARED = {"heads": 4, "kv_heads": 2, "head_width": 8, "length": 64}
TIME = 50


def parts(seed=0, scale=1.0, batch=1, time=TIME, width=8):
    """Queries of 4 heads, keys and values of 2."""
    keys = jax.random.split(jax.random.key(seed), 3)
    return [scale * jax.random.normal(k, (batch, time, h, width)) for k, h in zip(keys, (4, 2, 2))]


def averaged(similar, q, k, v, causal=True):
    """Return values averaged by ``similar(q_t, k_s, t, s, group)``, in float64, by loops."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    y = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, t, h in np.ndindex(*q.shape[:3]):
        group, keys = h // (q.shape[2] // k.shape[2]), range(t + 1 if causal else q.shape[1])
        weights = np.array([similar(q[b, t, h], k[b, s, group], t, s, (h, group)) for s in keys])
        y[b, t, h] = weights @ v[b, : len(weights), group] / weights.sum()
    return y


def near(got, want, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=tolerance * np.abs(want).max())


@pytest.mark.parametrize("causal", [True, False])
def test_based_is_its_taylor_series(causal):
    q, k, v = parts()

    def similar(q, k, t, s, heads):
        product = q @ k / np.sqrt(len(q))
        return 1 + product + product**2 / 2

    got, _ = based.forward(q, k, v, seq=whole(1, TIME), causal=causal)
    near(got, averaged(similar, q, k, v, causal))


@pytest.mark.parametrize("causal", [True, False])
def test_cosformer_weighs_by_the_cosine_of_the_distance(causal):
    q, k, v = parts()

    def similar(q, k, t, s, heads):
        product = (np.maximum(q, 0) + cosformer.LEAST) @ (np.maximum(k, 0) + cosformer.LEAST)
        return product * np.cos(np.pi * (t - s) / (2 * 64))

    got, _ = cosformer.forward(q, k, v, seq=whole(1, TIME), length=64, causal=causal)
    near(got, averaged(similar, q, k, v, causal))


@pytest.mark.parametrize("shift", [0.0, -20.0, -40.0])
def test_linear_is_its_feature_map_where_that_is_small(shift):
    """Where exp(x) - 1 + 1 would leave nothing of exp(x)."""
    q, k, v = parts()
    q, k = q + shift / 2, k.at[:, 5:].add(shift)

    def phi(x):
        return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))

    got, _ = linear.forward(q, k, v, seq=whole(1, TIME))
    near(got, averaged(lambda q, k, t, s, heads: phi(q) @ phi(k), q, k, v))


def test_hedgehog_is_a_softmax_of_features(rng):
    q, k, v = parts()
    maps = rng.normal(size=(4, 8, 8)).astype(np.float32), rng.normal(size=(2, 8, 8)).astype(np.float32)

    def phi(x, weight):
        x = np.exp(np.concatenate([x @ weight, -(x @ weight)]))
        return x / x.sum()

    def similar(q, k, t, s, heads):
        return phi(q, maps[0][heads[0]].astype(np.float64)) @ phi(k, maps[1][heads[1]].astype(np.float64))

    got, _ = hedgehog.forward(q, k, v, *map(jnp.asarray, maps), seq=whole(1, TIME))
    near(got, averaged(similar, q, k, v))


@pytest.mark.parametrize("scale", [1.0, 30.0, 100.0])
@pytest.mark.parametrize("name", ["linear", "hedgehog", "cosformer", "based"])
def test_gradients_of_large_inputs_are_finite_and_the_references(name, scale):
    """Averages then divide by all but nothing."""
    x = scale * jax.random.normal(jax.random.key(0), (2, 130, 16))
    weight = jax.random.normal(jax.random.key(2), x.shape)

    def pull(implementation):
        mixer = make(name, {}, SHARED | {"length": 130, "implementation": implementation})
        params = mixer.init(jax.random.key(1), x[:, :2], whole(2, 2))

        def weighted(params):
            y = mixer.apply(params, x, whole(2, 130))[0]
            return jnp.sum(y * weight), y

        return jax.tree.leaves(jax.jit(jax.grad(weighted, has_aux=True))(params))

    for got, want in zip(pull("auto"), pull("reference"), strict=True):
        assert np.isfinite(got).all()
        near(got, want, 1e-4)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_performer_is_its_random_features(scale):
    """Large queries and keys too, whose features the plain equation only holds in float64."""
    q, k, v = parts(scale=scale)
    w_GRK = performer.projections(2, 8, 24, (3, 1)).astype(np.float64)

    def similar(q, k, t, s, heads):
        q, k = q * len(q) ** -0.25, k * len(k) ** -0.25
        w = w_GRK[heads[1]]
        return np.exp(w @ q - q @ q / 2) @ np.exp(w @ k - k @ k / 2)

    got, _ = performer.forward(q, k, v, seq=whole(1, TIME), projection_GRK=w_GRK.astype(np.float32))
    near(got, averaged(similar, q, k, v), 1e-4 if scale > 1 else 1e-5)


@pytest.mark.parametrize("width", [128, 256, 512])
def test_performer_has_wide_heads(width):
    """Where exp(-|w|² / 2), the bound of a key's features turned over, is below float32's smallest number."""
    q, k, v = parts(time=12, width=width)
    vectors = performer.projections(2, width, 48, (0, 0))
    got, _ = performer.forward(q, k, v, seq=whole(1, 12), projection_GRK=vectors)
    w_GRK = vectors.astype(np.float64)

    def similar(q, k, t, s, heads):
        q, k, w = q * width**-0.25, k * width**-0.25, w_GRK[heads[1]]
        return np.exp(w @ q - q @ q / 2) @ np.exp(w @ k - k @ k / 2)

    near(got, averaged(similar, q, k, v), 2e-5)


def test_performer_tends_to_softmax():
    q, k, v = parts(scale=0.4)
    errors = []
    for features in (16, 4096):
        vectors = performer.projections(2, 8, features, (0, 0))
        got, _ = performer.forward(q, k, v, seq=whole(1, TIME), projection_GRK=vectors)
        want = averaged(lambda q, k, *_: np.exp(q @ k / np.sqrt(len(q))), q, k, v)
        errors.append(np.sqrt(np.mean((got - want) ** 2)))
    assert errors[1] < errors[0] / 5 < 0.005


def test_random_features_follow_from_their_seed():
    for draw in (performer.projections, random_features.gaussians):
        first = draw(3, 8, 20, (0, 0))
        assert first.shape == (3, 20, 8)
        draw.cache_clear()
        np.testing.assert_array_equal(first, draw(3, 8, 20, (0, 0)))
        others = [first[1], first[2], draw(3, 8, 20, (1, 0))[0], draw(3, 8, 20, (0, 1))[0]]
        assert all(np.abs(first[0] - other).max() > 0.1 for other in others)


def test_performer_vectors_are_orthogonal_and_gaussian_in_length():
    vectors = performer.projections(2, 8, 20, (0, 0))
    for block in (vectors[0, :8], vectors[1, 8:16], vectors[0, 16:]):
        unit = block / np.linalg.norm(block, axis=1, keepdims=True)
        np.testing.assert_allclose(unit @ unit.T, np.eye(len(block)), atol=1e-5)
    many = performer.projections(1, 8, 8000, (0, 0))[0]
    np.testing.assert_allclose(np.sum(many**2, axis=1).mean(), 8.0, rtol=0.02)
    np.testing.assert_allclose(np.sum(many**2, axis=1).var(), 16.0, rtol=0.1)
    np.testing.assert_allclose(many.mean(axis=0), 0.0, atol=0.05)


def test_any_chunk_gives_the_same():
    q, k, v = (jnp.abs(x) for x in parts(batch=2))
    log_decay = -jnp.exp(jax.random.normal(jax.random.key(5), (2, TIME, 2)))
    segment = jnp.asarray([[1] * 20 + [0] * 5 + [2] * 25, [3] * 50], jnp.int32)
    for decay in (None, log_decay):
        quick = jax.jit(average, static_argnames="chunk")
        seq = Seq(segment, segment)
        ys = [quick(q, k, v, seq, chunk=chunk, log_decay_BTG=decay)[0] for chunk in (1, 16, 64, TIME)]
        for y in ys[1:]:
            near(y, np.asarray(ys[0], np.float64), 1e-6)


def recurrence(q, k, v, decay):
    """The gated average of positive features token by token, in float64."""
    q, k, v, decay = (np.asarray(x, np.float64) for x in (q, k, v, decay))
    memory, total, y = np.zeros((2, 8, 8)), np.zeros((2, 8)), np.zeros(q.shape)
    for t in range(q.shape[1]):
        memory = memory * decay[0, t][:, None, None] + k[0, t][:, :, None] * v[0, t][:, None]
        total = total * decay[0, t][:, None] + k[0, t]
        for h in range(4):
            y[0, t, h] = q[0, t, h] @ memory[h // 2] / (q[0, t, h] @ total[h // 2])
    return y


@pytest.mark.parametrize("decay", [1e-6, 0.5, 0.999999, 1.0, "mixed"])
def test_decays_of_any_strength(decay):
    q, k, v = (jnp.abs(x) + 0.1 for x in parts())
    if decay == "mixed":  # a long memory right behind tokens that leave nothing
        decay_BTG = jnp.where(jnp.arange(TIME)[None, :, None] % 17 < 8, 1e-6, 0.999)
    else:
        decay_BTG = jnp.full((1, TIME, 1), decay)
    decay_BTG = jnp.broadcast_to(decay_BTG, (1, TIME, 2))
    got, _ = average(q, k, v, whole(1, TIME), log_decay_BTG=jnp.log(decay_BTG))
    near(got, recurrence(q, k, v, decay_BTG), 2e-6)


def gated(seq, state=None, start=0, end=TIME, form=random_features.forward):
    q, k, v = (x[:, start:end] for x in parts(batch=2))
    sigma = jnp.asarray([[0.9], [1.1]]) * jnp.ones((2, 8))
    gate = 2.0 * jax.random.normal(jax.random.key(7), (2, TIME, 2))[:, start:end]
    vectors = random_features.gaussians(2, 8, 32, (0, 0))
    state = {} if state is None else {"state": state}
    return jax.jit(form)(q, k, v, sigma, gate, seq=seq, gaussian_GRK=jnp.asarray(vectors), **state)


def test_gated_random_features_are_their_recurrence():
    """RFA-Gate: s = g s + (1 - g) phi(k) v, z likewise; y = phi(q) s / phi(q) z."""
    segment = jnp.asarray([[1] * 20 + [0] * 5 + [2] * 25, [3] * 50], jnp.int32)
    seq = Seq(segment, jnp.zeros_like(segment))
    got, _ = gated(seq)
    position = jnp.asarray([[*range(20), *[0] * 5, *range(25)], [*range(50)]], jnp.int32)
    near(got, np.asarray(gated(Seq(segment, position), form=random_features.reference), np.float64), 2e-5)

    q, k, v = (np.asarray(x, np.float64)[1] for x in parts(batch=2))
    gate = 1 / (1 + np.exp(-2.0 * np.asarray(jax.random.normal(jax.random.key(7), (2, TIME, 2)))[1]))
    vectors = random_features.gaussians(2, 8, 32, (0, 0)) * np.asarray([0.9, 1.1])[:, None, None]

    def phi(x, group):
        angle = vectors[group] @ (x / np.linalg.norm(x))
        return np.concatenate([np.sin(angle), np.cos(angle)]) / np.sqrt(32)

    memory, total = np.zeros((2, 64, 8)), np.zeros((2, 64))
    for t in range(TIME):
        for group in range(2):
            new, g = phi(k[t, group], group), gate[t, group]
            memory[group] = g * memory[group] + (1 - g) * np.outer(new, v[t, group])
            total[group] = g * total[group] + (1 - g) * new
        for h in range(4):
            query = phi(q[t, h], h // 2)
            want = query @ memory[h // 2] / max(query @ total[h // 2], random_features.FLOOR)
            near(got[1, t, h], want, 1e-4)


def test_gated_random_features_fold():
    seq = whole(2, TIME)
    want, state = gated(seq)[0], None
    for start, end in ((0, 1), (1, 25), (25, 26), (26, TIME)):
        y, state = gated(whole(2, end - start, start), state, start, end)
        near(y, np.asarray(want[:, start:end], np.float64), 2e-5)


@pytest.mark.parametrize(
    "name, field, value",
    [
        ("performer", "features", 0),
        ("performer", "seed", -1),
        ("random_features", "features", 0),
        ("based", "feature_width", 0),
        ("based", "feature_width", 3),
        ("linear", "feature_map", "elu"),
    ],
)
def test_bad_fields_are_refused(name, field, value):
    with pytest.raises(FieldError, match=field):
        make(name, {field: value}, SHARED | {"positions": "rope"})


def test_cosformer_refuses_rows_beyond_its_horizon():
    """Beyond M the cosine turns negative."""
    x = jnp.zeros((1, 65, 8))
    with pytest.raises(FieldError, match="length: 64 is not allowed"):
        jax.eval_shape(make("cosformer", {}, SHARED).init, jax.random.key(0), x, whole(1, 65))


def test_gates_are_causal():
    with pytest.raises(FieldError, match="gated"):
        make("random_features", {"gated": True}, SHARED | {"bidirectional_mode": True})
