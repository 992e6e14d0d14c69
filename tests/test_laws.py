"""The laws of the attention contract, over the whole table: a new row needs no new test."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastformer.attention import VARIANTS, Context, make
from fastformer.core.seq import Seq

NAMES = tuple(VARIANTS)
WIDTH, HEADS, GROUPS, HEAD = 24, 4, 2, 6
# What a token of a short segment learns nothing of: how to choose among others, what lies beyond a window.
SEES_OTHERS_ONLY = ("lsh", "lolcats")
NEAR = 6  # tokens, of which a token learns from one at least: some mixers choose whom they see
TIME = 129  # where a test does not care, so that it shares what another has compiled
CASES = [("causal", time) for time in (1, 7, 64, TIME)] + [("bidirectional", time) for time in (7, TIME)]


def whole(batch, time, start=0):
    position = np.broadcast_to(np.arange(start, start + time, dtype=np.int32), (batch, time))
    return Seq(np.ones((batch, time), np.int32), position)


def able(ability):
    return [name for name, variant in VARIANTS.items() if getattr(variant, ability)]


def mixer(name, **shared):
    fields = {"heads": HEADS, "kv_heads": GROUPS, "head_width": HEAD, "length": 8192}
    return make(name, VARIANTS[name].small, fields | usual(name) | shared)


def usual(name):
    """Return the fields that a variant is tested with where a test does not say; causal where it can be."""
    return {"positions": "rope", "dtype": jnp.float32, "bidirectional_mode": not VARIANTS[name].causal}


@functools.cache
def params(name, **shared):
    x = jnp.zeros((1, 4, WIDTH))
    variables = nn.unbox(jax.jit(mixer(name, **shared).init)(jax.random.key(0), x, whole(1, 4)))
    # Away from their initial values, so that no parameter is hidden behind a zero or a one.
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(tree, [a + 0.1 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys)])


def inputs(batch, time, seed=0):
    """Return normal numbers, in numpy: cutting a jax array compiles a program for every cut."""
    return np.asarray(jax.random.normal(jax.random.key(seed), (batch, time, WIDTH)))


def packed(time, seed=0):
    """Two rows of several segments, with padding between some and at the end."""
    rng = np.random.default_rng(seed)
    segment, position = np.zeros((2, time), np.int32), np.zeros((2, time), np.int32)
    for row in range(2):
        start, number = 0, 0
        while start < time:
            size = int(rng.integers(1, max(2, time // 2)))
            number += 1
            end = min(start + size, time)
            if rng.random() > 0.25 or start == 0:
                segment[row, start:end] = number
                position[row, start:end] = np.arange(end - start)
            start = end
    return Seq(segment, position)


@functools.lru_cache(maxsize=16)
def compiled(name, **shared):
    """One compiled layer for all tests that ask for the same: compiling is what these tests cost."""
    layer = mixer(name, **shared)
    return jax.jit(lambda variables, x, seq, state, context: layer.apply(variables, x, seq, state, context))


def apply(name, x, seq, state=None, context=None, **shared):
    return compiled(name, **usual(name) | shared)(params(name), x, seq, state, context)


@functools.lru_cache(maxsize=8)
def compiled_gradients(name, **shared):
    layer = mixer(name, **shared)

    def pull(variables, x, seq, weight):
        y, back = jax.vjp(lambda variables, x: layer.apply(variables, x, seq)[0], variables, x)
        return y.astype(jnp.float32), back(weight.astype(y.dtype))

    return jax.jit(pull)


def value_and_gradients(name, x, seq, first=0, **shared):
    """Return the output, and the gradients to every parameter and to x, of a loss that weighs all outputs.

    Outputs at positions before ``first`` are left out.
    """
    counts = (seq.position_BT >= first)[..., None]
    weight = np.where(counts, np.cos(np.arange(x.size, dtype=np.float32)).reshape(x.shape), 0.0)
    y, gradients = compiled_gradients(name, **usual(name) | shared)(params(name), x, seq, weight)
    return np.where(counts, y, 0.0), gradients


def close(a, b, tolerance=5e-5):
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
        np.testing.assert_allclose(left, right, atol=tolerance * max(1.0, np.abs(right).max()), rtol=0)


def towards(name, asked):
    """Return the fields that set a direction; a variant that cannot take it is skipped."""
    if name not in able(asked):
        pytest.skip(f"{name} does not declare {asked}")
    return {"bidirectional_mode": asked == "bidirectional"}


# (a) the fast form is the reference


@pytest.mark.parametrize("direction, time", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_forward_is_reference(name, direction, time):
    mode = towards(name, direction)
    x, seq = inputs(2, time), packed(time)
    fast = value_and_gradients(name, x, seq, **mode)
    slow = value_and_gradients(name, x, seq, implementation="reference", **mode)
    close(fast, slow)
    # A token that sees one other at the most learns nothing of how to choose it.
    long = 7 if name in SEES_OTHERS_ONLY else 1
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(slow[1]) if g.size and time > long)


@pytest.mark.parametrize("positions, soft_cap", [("alibi", 0.0), ("none", 5.0)])
@pytest.mark.parametrize("name", able("scores"))
def test_bent_scores_are_the_references(name, positions, soft_cap):
    bend = {"positions": positions, "soft_cap": soft_cap}
    x, seq = inputs(2, TIME), packed(TIME)
    fast = value_and_gradients(name, x, seq, **bend)
    close(fast, value_and_gradients(name, x, seq, implementation="reference", **bend))
    plain = value_and_gradients(name, x, seq, positions="none")
    assert np.abs(fast[0] - plain[0]).max() > 1e-3


@pytest.mark.parametrize("name", able("cross"))
def test_cross_is_reference(name):
    x, seq = inputs(2, TIME), packed(TIME)
    context = Context(inputs(2, 70, seed=5), packed(70, seed=5))
    fast, slow = (
        apply(name, x, seq, None, context, implementation=form)[0] for form in ("auto", "reference")
    )
    close(fast, slow)
    assert np.abs(slow).max() > 0


# (b) any split of time folds to the whole


def fold(name, x, seq, cuts, state, **shared):
    parts, edges = [], [0, *cuts, x.shape[1]]
    for start, end in zip(edges, edges[1:]):
        piece = Seq(seq.segment_BT[:, start:end], seq.position_BT[:, start:end])
        y, state = apply(name, x[:, start:end], piece, state, **shared)
        parts.append(y)
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize("name", able("streaming"))
def test_splits_fold_to_the_whole(name):
    """Pieces of 1, 20 and 29 tokens in several orders, one by one too, from an empty state and from none."""
    x = inputs(2, 70)
    state = mixer(name).init_state(2, 70)
    for seq in (whole(2, 70), packed(70)):
        want = apply(name, x, seq)[0]
        for cuts in ((20, 40, 41), (1, 21, 50), (29, 30, 50), tuple(range(1, 70))):
            close(fold(name, x, seq, cuts, state), want)
    close(fold(name, x, seq, (20,), None), want)


@pytest.mark.parametrize("name", [n for n in able("streaming") if n in able("scores")])
def test_splits_fold_with_bent_scores(name):
    bend = {"positions": "alibi", "soft_cap": 5.0}
    x, seq = inputs(2, 30), whole(2, 30)
    state = mixer(name).init_state(2, 30)
    close(fold(name, x, seq, (14, 15, 16), state, **bend), apply(name, x, seq, **bend)[0])


@pytest.mark.parametrize("name", able("streaming"))
def test_rows_of_unequal_length_go_on_where_they_stopped(name):
    """Right-padded prompts: padding is not written, and each row goes on from its own end."""
    x, lengths = inputs(2, 70), (25, 13)
    state = mixer(name).init_state(2, 70)
    real = np.arange(29)[None] < np.asarray(lengths)[:, None]
    prompt = Seq(real.astype(np.int32), np.broadcast_to(np.arange(29), (2, 29)))
    _, state = apply(name, x[:, :29], prompt, state)
    position = np.asarray(lengths)
    for _ in range(6):
        token = np.take_along_axis(x, position[:, None, None], axis=1)
        y, state = apply(name, token, Seq(np.ones((2, 1), np.int32), position[:, None]), state)
        position = position + 1
    for row, length in enumerate(lengths):
        real = (np.arange(70) < length + 6).astype(np.int32)
        seq = Seq(np.broadcast_to(real, (2, 70)), whole(2, 70).position_BT)
        close(y[row, 0], apply(name, x, seq)[0][row, length + 5])


@pytest.mark.parametrize("name", able("streaming"))
def test_states_are_static(name):
    """A state keeps shapes and dtypes, so that a compiled loop can carry it."""
    state = mixer(name).init_state(2, 32)
    for time in (1, 5):
        _, after = jax.eval_shape(mixer(name).apply, params(name), inputs(2, time), whole(2, time), state)
        shapes = [jax.tree.map(lambda a: (a.shape, a.dtype), s) for s in (state, after)]
        assert shapes[0] == shapes[1]


# (c) packed rows are rows alone


@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
@pytest.mark.parametrize("name", NAMES)
def test_packed_rows_are_rows_alone(name, direction):
    mode = towards(name, direction)
    x, seq = inputs(2, TIME), packed(TIME)
    together = value_and_gradients(name, x, seq, **mode)[0]
    assert int(seq.segment_BT.max()) > 2
    checked = 0
    for row in range(2):
        for number in range(1, int(seq.segment_BT[row].max()) + 1):
            where = np.flatnonzero(seq.segment_BT[row] == number)
            if not len(where):
                continue
            alone, size = np.zeros((2, TIME, WIDTH), np.float32), len(where)
            alone[:, :size] = x[row, where]
            segment = np.broadcast_to(np.arange(TIME) < size, (2, TIME)).astype(np.int32)
            piece = Seq(segment, whole(2, TIME).position_BT)
            want = value_and_gradients(name, alone, piece, **mode)[0]
            close(together[row, where], want[0, :size])
            checked += 1
    assert checked > 3


# (d) causality, by gradient


def reach_of(name, at, **shared):
    """Return how far each token reaches what comes out at ``at``: the largest gradient to it, [T]."""
    x, seq = inputs(2, TIME), whole(2, TIME)
    weight = np.zeros(x.shape, np.float32)
    weight[0, at] = 1.0
    pull = compiled_gradients(name, **usual(name) | shared)(params(name), x, seq, weight)[1][1]
    assert not np.any(pull[1])
    return np.abs(pull[0]).max(axis=-1)


@pytest.mark.parametrize("name", able("causal"))
def test_causality_by_gradient(name):
    at = 100
    reach = reach_of(name, at, bidirectional_mode=False)
    assert np.all(reach[at + 1 :] == 0)
    assert reach[at] > 0 and reach[at - NEAR : at].max() > 0


@pytest.mark.parametrize("name", able("bidirectional"))
def test_bidirectional_sees_both_sides(name):
    at = 100
    reach = reach_of(name, at, bidirectional_mode=True)
    assert reach[at + 1 : at + 1 + NEAR].max() > 0 and reach[at - NEAR : at].max() > 0


# (e) what must not be read is not read


@pytest.mark.parametrize("name", NAMES)
def test_nan_in_padding_goes_nowhere(name):
    x, seq = inputs(2, TIME), packed(TIME)
    padding = (seq.segment_BT == 0)[..., None]
    assert padding.any()
    poisoned = np.where(padding, np.nan, x)
    clean = value_and_gradients(name, np.where(padding, 0.0, x), seq)
    got = value_and_gradients(name, poisoned, seq)
    close(got, clean)
    assert np.all(np.asarray(got[0])[np.asarray(padding)[..., 0]] == 0)


@pytest.mark.parametrize("time", [1, 29])
@pytest.mark.parametrize("name", able("streaming"))
def test_nan_in_unused_slots_goes_nowhere(name, time):
    if not hasattr(mixer(name).init_state(1, 1), "segment_BS"):
        pytest.skip(f"the state of {name} has no slots")
    x = inputs(2, 30)
    _, state = apply(name, x[:, :1], whole(2, 1), mixer(name).init_state(2, 70))
    slots = state.segment_BS

    def poison(leaf):
        if leaf.dtype != jnp.float32 or leaf.shape[:2] != slots.shape:
            return leaf
        unused = (slots == 0).reshape(slots.shape + (1,) * (leaf.ndim - 2))
        return jnp.where(unused, jnp.nan, leaf)

    poisoned = jax.tree.map(poison, state)
    assert any(np.isnan(leaf).any() for leaf in jax.tree.leaves(poisoned))
    step = functools.partial(apply, name, x[:, 1 : 1 + time], whole(2, time, 1))
    close(step(poisoned)[0], step(state)[0])


# (f) eight devices are one


@pytest.mark.parametrize("name", NAMES)
def test_eight_devices_are_one(name):
    from fastformer.core.mesh import MeshConfig, make_mesh, rules, use

    x, seq = inputs(4, 70), whole(4, 70)
    want = np.concatenate([apply(name, half, whole(2, 70))[0] for half in (x[:2], x[2:])])
    if VARIANTS[name].context_parallel:
        mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2, sequence=2))
    else:
        mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    letters = {"B": ("data", "fsdp"), "D": ("fsdp",), "H": ("tensor",), "G": ("tensor",)}
    letters |= dict.fromkeys("TS", ("sequence",))
    with use(mesh, rules(letters)):
        step = jax.jit(lambda variables, x, seq: mixer(name).apply(variables, x, seq)[0])
        lowered = step.lower(params(name), x, seq)
        got = step(params(name), x, seq)
    assert lowered.as_text().count("sharding_constraint") >= 5
    assert ("collective_permute" in lowered.as_text()) == VARIANTS[name].context_parallel
    close(got, want)


# (g) low precision


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_near(name):
    """Outputs within 3 % of float32 and gradients within 5 %, in root mean square, from the ninth token on.

    What a norm makes of the first tokens is sign(q.k) v: where q.k is near zero, any rounding is magnified.
    """
    x, seq = inputs(2, TIME), packed(TIME)
    low, high = (value_and_gradients(name, x, seq, first=8, dtype=d) for d in (jnp.bfloat16, jnp.float32))
    for index, (a, b) in enumerate(zip(jax.tree.leaves(low), jax.tree.leaves(high), strict=True)):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        share = 0.05 if index else 0.03
        assert np.sqrt(np.mean((a - b) ** 2)) < share * np.sqrt(np.mean(b**2)) + 1e-6


@pytest.mark.parametrize("name", able("streaming"))
def test_bfloat16_streams_as_it_trains(name):
    x, seq, low = inputs(2, 60), whole(2, 60), {"dtype": jnp.bfloat16}
    want = np.asarray(apply(name, x, seq, **low)[0], np.float64)
    state = mixer(name, **low).init_state(2, 60)
    got = np.asarray(fold(name, x, seq, (29, 30, 31), state, **low), np.float64)
    assert np.sqrt(np.mean((got - want) ** 2)) < 0.02 * np.sqrt(np.mean(want**2))


# (h) long sequences stay finite


@pytest.mark.parametrize("name", NAMES)
def test_long_sequences_stay_finite(name):
    y, gradients = value_and_gradients(name, 3.0 * inputs(1, 8192), whole(1, 8192))
    for leaf in jax.tree.leaves((y, gradients)):
        assert np.isfinite(leaf).all()
    assert np.abs(y[:, -1]).max() > 0


# what cannot be done says so


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ability", ["cross", "streaming", "bidirectional", "causal", "prefix_lm"])
def test_what_is_not_declared_is_refused(name, ability):
    if getattr(VARIANTS[name], ability):
        pytest.skip(f"{name} declares {ability}")
    x, seq = inputs(1, 4), whole(1, 4)
    asked = {
        "cross": ({}, (None, Context(x, seq))),
        "streaming": ({}, ((), None)),
        "bidirectional": ({"bidirectional_mode": True}, (None, None)),
        "causal": ({"bidirectional_mode": False}, (None, None)),
        "prefix_lm": ({}, (None, None)),
    }
    shared, call = asked[ability]
    seq = seq._replace(last_BT=np.full((1, 4), 3)) if ability == "prefix_lm" else seq
    others = ", ".join(able(ability)) or "none"
    with pytest.raises(Exception, match=f"not {ability}; variants that are {ability}: {others}"):
        mixer(name, **shared).apply(params(name), x, seq, *call)
