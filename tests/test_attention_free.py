"""FNet, AFT, additive attention and Hyena against their equations in float64; what the laws do not see."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastformer.attention import additive, aft, fnet, hyena, make
from fastformer.attention.packed import per_segment, running_sums, runs
from fastformer.core.errors import FieldError
from fastformer.core.seq import Seq, whole

SHARED = {"heads": 4, "kv_heads": 2, "head_width": 8, "length": 64}


def rows(*lengths_of_rows, time):
    """Rows of segments of these lengths; a negative one is padding."""
    segment = np.zeros((len(lengths_of_rows), time), np.int32)
    position = np.zeros_like(segment)
    for row, lengths in enumerate(lengths_of_rows):
        start = 0
        for number, length in enumerate(lengths, start=1):
            if length > 0:
                segment[row, start : start + length] = number
                position[row, start : start + length] = np.arange(length)
            start += abs(length)
    return Seq(jnp.asarray(segment), jnp.asarray(position))


def spans(seq):
    """Yield row, slice and positions of every segment."""
    segment = np.asarray(seq.segment_BT)
    for row in range(len(segment)):
        for number in sorted(set(segment[row]) - {0}):
            where = np.flatnonzero(segment[row] == number)
            yield row, slice(where[0], where[-1] + 1)


def near(got, want, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=tolerance * max(1, np.abs(want).max()))


def normal(seed, *shape, scale=1.0):
    return scale * np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


MIXED = rows((1, 2, -3, 5, 17, 31, -1, 64), (97, 3, 3, -20, 1), time=124)


# segments


def test_runs_know_where_segments_stand():
    where = runs(MIXED.segment_BT)
    for row, span in spans(MIXED):
        assert (where.first_BT[row, span] == span.start).all()
        assert (where.last_BT[row, span] == span.stop - 1).all()


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_running_sums_are_a_softmax_of_the_past(scale):
    logit, value = normal(0, 2, 124, 3, scale=scale), normal(1, 2, 124, 3)
    got = jax.jit(lambda *x: running_sums(*x, MIXED.segment_BT).average())(logit, value)
    for row, span in spans(MIXED):
        scores, values = (np.asarray(x[row, span], np.float64) for x in (logit, value))
        for t in range(len(scores)):
            weights = np.exp(scores[: t + 1] - scores[: t + 1].max(axis=0))
            near(got[row, span][t], (weights * values[: t + 1]).sum(axis=0) / weights.sum(axis=0))


@pytest.mark.parametrize("lengths", [(1,), (3, -2, 16, 17, 5), (200,), (1,) * 40])
def test_slots_hold_every_segment_alone(lengths):
    """Values and gradients of a transform that mixes all of a segment, weighed by what all share."""
    time = sum(map(abs, lengths)) + 3
    seq, x, w = rows(lengths, lengths[::-1], time=time), normal(0, 2, time, 2), normal(1, time)

    def transform(x_BNCR, size_BN, w_T):
        total = jnp.einsum("BNCR,C->BNR", x_BNCR, w_T[: x_BNCR.shape[2]])
        return x_BNCR * total[:, :, None] / jnp.maximum(size_BN, 1)[:, :, None, None]

    def dense(x, w, segment):
        where = runs(segment)
        same = (segment[:, :, None] == segment[:, None, :]) & (segment > 0)[:, None]
        weight = w[jnp.arange(time)[None] - where.first_BT]
        total = jnp.einsum("BTS,BSR->BTR", same * weight[:, None], x)
        return jnp.where(segment[..., None] > 0, x * total / where.size_BT[..., None], 0.0)

    def loss(form):
        return jax.jit(jax.value_and_grad(lambda x, w: jnp.sum(jnp.sin(form(x, w))), (0, 1)))(x, w)

    got = loss(lambda x, w: per_segment(transform, x, w, seq.segment_BT))
    want = loss(lambda x, w: dense(x, w, seq.segment_BT))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        near(a, np.asarray(b, np.float64))


# FNet


@pytest.mark.parametrize("seq", [MIXED, rows((521,), (260, 261), time=521), whole(2, 256), whole(2, 1)])
def test_fnet_is_the_fourier_transform_of_each_segment(seq):
    x = normal(0, *seq.segment_BT.shape, 12)
    got = jax.jit(lambda x: fnet.forward(x, seq=seq))(x)
    for row, span in spans(seq):
        near(got[row, span], np.fft.fft2(np.asarray(x[row, span], np.float64)).real)
    assert not np.any(np.asarray(got)[np.asarray(seq.segment_BT) == 0])


def test_fnet_orthonormal_keeps_the_size():
    x = normal(0, 2, 124, 24)
    shared = {"heads": 4, "head_width": 6, "bidirectional_mode": True}
    layers = (make("fnet", {"orthonormal": scaled}, shared) for scaled in (False, True))
    plain, scaled = (jax.jit(lambda x, layer=layer: layer.apply({}, x, MIXED)[0])(x) for layer in layers)
    for row, span in spans(MIXED):
        size = span.stop - span.start
        near(scaled[row, span], np.asarray(plain[row, span], np.float64) / np.sqrt(24 * size))


# AFT


def biases(kind, scale=1.0):
    if kind == "low_rank":
        left, right = normal(5, 128, 3, scale=scale), normal(6, 128, 3)
        return aft.Bias(jnp.asarray(left), jnp.asarray(right), window=7)
    offset = jnp.asarray(normal(5, 2, 13, scale=scale))
    return aft.Bias(offset_GW=offset, window=7) if kind == "conv" else aft.Bias()


def written_out(q, k, v, bias, seq, causal):
    y = np.zeros(q.shape)
    for row, span in spans(seq):
        queries, keys, values = (np.asarray(x[row, span], np.float64) for x in (q, k, v))
        for t, h in np.ndindex(queries.shape[:2]):
            seen = range(t + 1 if causal else len(queries))
            w = np.zeros(len(seen))
            for s in seen:
                if abs(t - s) < bias.window and bias.left_LR is not None:
                    w[s] = np.asarray(bias.left_LR, np.float64)[t] @ np.asarray(bias.right_LR, np.float64)[s]
                elif abs(t - s) < bias.window and bias.offset_GW is not None:
                    w[s] = bias.offset_GW[h // 2, t - s + bias.window - 1]
            scores = keys[: len(seen), h // 2] + w[:, None]
            weights = np.exp(scores - scores.max(axis=0))
            context = (weights * values[: len(seen), h // 2]).sum(axis=0) / weights.sum(axis=0)
            y[row, span][t, h] = context / (1 + np.exp(-queries[t, h]))
    return y


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind, scale", [("simple", 1.0), ("low_rank", 1.0), ("conv", 30.0)])
def test_aft_is_its_equation(kind, scale, causal):
    seq = rows((1, 2, -3, 5, 17), (24, 3, 3), time=31)
    q, k, v = normal(0, 2, 31, 4, 5), normal(1, 2, 31, 2, 5, scale=scale), normal(2, 2, 31, 2, 5)
    bias = biases(kind, scale)
    want = written_out(q, k, v, bias, seq, causal)
    real = np.asarray(seq.segment_BT) > 0
    for form in (aft.forward, aft.reference):
        got = jax.jit(lambda q, k, v, form=form: form(q, k, v, bias, seq=seq, causal=causal))(q, k, v)
        near((got[0] if form is aft.forward else got)[real], want[real])


@pytest.mark.parametrize("kind", ["simple", "conv"])
def test_aft_of_every_kind_trains_and_streams(kind):
    """The laws run the default kind; these are the first two of them for the others."""
    seq, x = rows((30, -3, 37), (1, 40, 9), time=70), normal(3, 2, 70, 12)
    fields = {"kind": kind, "window": 7}
    shared = SHARED | {"head_width": 3}
    layers = [make("aft", fields, shared | {"implementation": form}) for form in ("auto", "reference")]
    variables = jax.jit(layers[0].init)(jax.random.key(0), x, seq)
    variables = jax.tree.map(lambda a: a + 0.3 * normal(4, *a.shape), variables)

    def loss(layer):
        return jax.jit(jax.value_and_grad(lambda v, x: jnp.sum(jnp.sin(layer.apply(v, x, seq)[0])), (0, 1)))

    fast, slow = (loss(layer)(variables, x) for layer in layers)
    for a, b in zip(jax.tree.leaves(fast), jax.tree.leaves(slow)):
        near(a, np.asarray(b, np.float64), 2e-5)
        assert np.abs(b).max() > 0
    state = layers[0].init_state(2, 70)
    step = jax.jit(layers[0].apply)
    want = step(variables, x, seq)[0]
    edges = [0, *range(27, 44), 70]  # in the middle token by token, over the ends of segments
    for start, end in zip(edges, edges[1:]):
        piece = Seq(seq.segment_BT[:, start:end], seq.position_BT[:, start:end])
        y, state = step(variables, x[:, start:end], piece, state)
        near(y, np.asarray(want[:, start:end], np.float64), 2e-5)


# additive attention


def test_additive_is_its_equation():
    q, k, v = normal(0, 2, 124, 4, 6), normal(1, 2, 124, 2, 6), normal(2, 2, 124, 2, 6)
    query, key, mix = normal(3, 4, 6), normal(4, 4, 6), normal(5, 24, 24)
    got = jax.jit(lambda *x: additive.forward(*x, seq=MIXED))(q, k, v, query, key, mix)
    for row, span in spans(MIXED):
        queries, keys, values = (np.asarray(x[row, span], np.float64) for x in (q, k, v))
        u = np.zeros_like(queries)
        for h in range(4):
            alpha = np.exp(queries[:, h] @ np.asarray(query, np.float64)[h] / np.sqrt(6))
            p = (alpha / alpha.sum()) @ queries[:, h] * keys[:, h // 2]
            beta = np.exp(p @ np.asarray(key, np.float64)[h] / np.sqrt(6))
            u[:, h] = (beta / beta.sum()) @ p * values[:, h // 2]
        mixed = u.reshape(len(u), -1) @ np.asarray(mix, np.float64)
        near(got[row, span], queries + mixed.reshape(u.shape), 2e-5)


# Hyena


def network(weights, count, length):
    """Return the filters by the paper's section 3.3, in float64, distance by distance."""
    enter, frequency, inner, bias, leave, skip = (np.asarray(w, np.float64) for w in weights)
    bands, out = (len(enter) - 1) // 2, []
    rate = np.linspace(np.log(100) / 1.5, np.log(100) / 0.3, skip.shape[1])
    for t in range(count):
        wave = np.exp(-2j * np.pi * t / length * np.linspace(1e-4, bands - 1, bands))
        x = np.concatenate([[t / (length - 1)], wave.real, wave.imag])
        for weight, shift in zip([enter, *inner], bias):
            x = np.sin(frequency * (x @ weight + shift))
        out.append(np.einsum("f,flr->lr", x, leave) * np.exp(-t / (length - 1) * rate))
    return np.stack(out)


@pytest.mark.parametrize("depth", [2, 3])
def test_hyena_is_gates_and_convolutions(depth):
    features, n = 6, depth - 1
    shapes = {"enter_EF": (5, 8), "frequency_F": (8,), "inner_LFF": (2, 8, 8), "bias_LF": (3, 8)}
    shapes |= {"leave_FLR": (8, n, features), "skip_LR": (n, features)}
    weights = hyena.Filter(**{name: normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())})
    parts = tuple(normal(20 + i, 2, 124, 2, 3) for i in range(depth + 1))
    got, _ = jax.jit(lambda *x: hyena.forward(*x, seq=MIXED, length=128))(parts, weights)
    h = network(weights, 124, 128)
    near(hyena.filters(weights, 124, 128), h)
    for row, span in spans(MIXED):
        *gates, z = (np.asarray(part[row, span], np.float64).reshape(-1, features) for part in parts)
        for i, gate in enumerate(reversed(gates[1:])):
            z = gate * z
            convolved = [np.convolve(z[:, r], h[:, i, r])[: len(z)] for r in range(features)]
            z = np.stack(convolved, axis=1) + np.asarray(weights.skip_LR, np.float64)[i] * z
        near(got[row, span].reshape(-1, features), gates[0] * z, 2e-5)


@pytest.mark.parametrize(
    "name, field, value",
    [
        ("hyena", "depth", 1),
        ("hyena", "filter_features", 4),
        ("hyena", "filter_layers", 0),
        ("hyena", "filter_width", 0),
        ("aft", "kind", "full"),
        ("aft", "window", 0),
        ("aft", "bias_rank", 0),
    ],
)
def test_bad_fields_are_refused(name, field, value):
    with pytest.raises(FieldError, match=field):
        make(name, {field: value}, SHARED)


@pytest.mark.parametrize("name, length", [("aft", 5), ("hyena", 0)])
def test_rows_longer_than_the_weights_are_refused(name, length):
    layer = make(name, {}, SHARED | {"length": length})
    with pytest.raises(FieldError, match="length"):
        jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 6, 12)), whole(1, 6))
