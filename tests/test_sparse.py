"""Sparse patterns against masks built token by token from the papers, and what laws do not see."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastformer.attention import (
    bigbird,
    chosen,
    dilated,
    factorised,
    longformer,
    make,
    moba,
    native_sparse,
    sinks,
    topk,
)
from fastformer.attention.positions import rope
from fastformer.core.errors import FieldError
from fastformer.core.seq import Seq, whole
from fastformer.report.cost import flops

DRAW = jax.jit(bigbird.draw, static_argnums=(0, 1, 4))
LENGTHS = (30, 5, 20)  # of the segments of one row; then padding
TIME = sum(LENGTHS) + 4


def row():
    segment = np.concatenate([np.full(n, i + 1) for i, n in enumerate(LENGTHS)] + [np.zeros(4)])
    position = np.concatenate([np.arange(n) for n in (*LENGTHS, 4)])
    return Seq(*(jnp.asarray(x[None], jnp.int32) for x in (segment, position)))


def seen(forward, heads=2):
    """Return which keys each query averages when all scores are equal, [H, T, T] bool; rows are packed."""
    q = jnp.zeros((1, TIME, heads, 4))
    v = jnp.broadcast_to(jnp.eye(TIME)[None, :, None], (1, TIME, heads, TIME))
    y = np.asarray(jax.jit(lambda q, v: forward(q, q, v, seq=row())[0])(q, v))[0].swapaxes(0, 1)
    count = np.maximum((y > 1e-6).sum(axis=-1, keepdims=True), 1)
    np.testing.assert_allclose(y, (y > 1e-6) / count, atol=1e-6)
    return y > 1e-6


def expected(rule, heads=2):
    """Return the mask of ``rule(i, j, head, length)``, segment by segment."""
    mask, start = np.zeros((heads, TIME, TIME), bool), 0
    for length in LENGTHS:
        for head in range(heads):
            for i in range(length):
                for j in range(length):
                    mask[head, start + i, start + j] = rule(i, j, head, length)
        start += length
    return mask


def fixed_sets(i, j, stride=8, columns=2):
    """Return whether j is in A(1) and in A(2) of i (1904.10509, section 4.3)."""
    return j <= i and j // stride == i // stride, j <= i and j % stride >= stride - columns


def strided_sets(i, j, stride=6):
    return max(0, i - stride) <= j <= i, j <= i and (i - j) % stride == 0


@functools.cache
def random_blocks(i, head, length, size=3, random=2, seed=5):
    """Return the blocks that block i draws in a segment of ``length`` tokens."""
    return set(np.asarray(DRAW(seed, 2, jnp.array(i), jnp.array((length - 1) // size), random))[head])


def bigbird_sees(i, j, head, length, size=3):
    i, j, last = i // size, j // size, (length - 1) // size
    return {i, j} & {0, last} or abs(i - j) < 2 or j in random_blocks(i, head, length)


FIXED, STRIDED = factorised.fixed_masks(8, 2), factorised.strided_masks(6)
PATTERNS = {
    "sinks": (
        functools.partial(sinks.forward, window=7, sinks=3),
        lambda i, j, h, n: j <= i and (i - j < 7 or j < 3),
    ),
    "dilated": (
        functools.partial(dilated.forward, window=4, dilations=(1, 3)),
        lambda i, j, h, n: j in [i - d * (1, 3)[h] for d in range(4)],
    ),
    "dilated both ways": (
        functools.partial(dilated.forward, window=4, dilations=(1, 3), causal=False),
        lambda i, j, h, n: j in [i + d * (1, 3)[h] for d in range(-3, 4)],
    ),
    "longformer": (
        lambda q, k, v, seq: longformer.forward(
            q, k, v, longformer.Global(q, k, v), seq=seq, window=3, dilation=2, tokens=2
        ),
        lambda i, j, h, n: j in [i + 2 * d for d in range(-2, 3)] or i < 2 or j < 2,
    ),
    "bigbird": (functools.partial(bigbird.forward, size=3, random=2, seed=5), bigbird_sees),
    "strided": (
        functools.partial(factorised.forward, masks=STRIDED[2:]),
        lambda i, j, h, n: any(strided_sets(i, j)),
    ),
    "strided by heads": (
        functools.partial(factorised.forward, masks=STRIDED[:2]),
        lambda i, j, h, n: strided_sets(i, j)[h],
    ),
    "fixed": (
        functools.partial(factorised.forward, masks=FIXED[2:]),
        lambda i, j, h, n: any(fixed_sets(i, j)),
    ),
    "fixed by heads": (
        functools.partial(factorised.forward, masks=FIXED[:2]),
        lambda i, j, h, n: fixed_sets(i, j)[h],
    ),
}


@pytest.mark.parametrize("block", [4, 128])
@pytest.mark.parametrize("name", PATTERNS)
def test_pattern_is_the_papers(name, block):
    forward, rule = PATTERNS[name]
    if name != "longformer":
        forward = functools.partial(forward, block=block)
    np.testing.assert_array_equal(seen(forward), expected(rule))


@pytest.mark.parametrize("name", ["strided", "fixed"])
def test_cost_grows_as_root_cubed_where_the_stride_grows_as_the_root(name):
    """The law counts at one stride; the paper chooses it near sqrt(T)."""

    def cost(time):
        layer = make(name, {"stride": math.isqrt(time)}, {"heads": 1, "head_width": 4})
        x, seq = jax.ShapeDtypeStruct((1, time, 4), jnp.float32), jax.eval_shape(lambda: whole(1, time))
        params = jax.eval_shape(layer.init, jax.random.key(0), x, seq)
        return flops(lambda params, x: layer.apply(params, x, whole(1, time))[0], params, x)

    # Four times the tokens.
    assert cost(65536) <= 8.4 * cost(16384)


def tensors(time=TIME, heads=4, groups=2, width=6, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return tuple(jax.random.normal(k, (1, time, n, width)) for k, n in zip(keys, (heads, groups, groups)))


def test_sinks_are_a_cache_with_positions_of_its_own():
    """Streaming by the paper's words: drop tokens from the cache, then rotate keys by their place in it."""
    window, first, base, time = 6, 2, 100.0, 25
    q, k, v = (np.asarray(x) for x in tensors(time, 1, 1))
    place = whole(1, time).position_BT
    turned = (rope(q, place, base), rope(k, place, base))
    y, _ = sinks.forward(*turned, v, seq=whole(1, time), window=window, sinks=first, rope_base=base)
    there = whole(1, window + first).position_BT
    for t in range(time):
        kept = [j for j in range(t + 1) if j < first or j > t - window]
        filled = np.array(kept + [0] * (window + first - len(kept)))
        keys = np.asarray(rope(k[:, filled], there, base))[0, : len(kept), 0]
        query = np.asarray(rope(q[:, t : t + 1], there[:, len(kept) - 1 :][:, :1], base))[0, 0, 0]
        weights = np.exp(keys @ query / np.sqrt(q.shape[-1]))
        weights /= weights.sum()
        np.testing.assert_allclose(y[0, t, 0], weights @ v[0, kept, 0], atol=2e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_topk_keeps_the_best_keys(causal):
    best, seq = 3, row()
    q, k, v = (np.asarray(x) for x in tensors())
    run = jax.jit(lambda *qkv: topk.forward(*qkv, seq=seq, best=best, causal=causal, block=16)[0])
    got = np.asarray(run(q, k, v))
    for t, head in ((3, 0), (30, 1), (33, 2), (50, 3)):
        same = np.asarray(seq.segment_BT[0] == seq.segment_BT[0, t]) & (not causal or np.arange(TIME) <= t)
        scores = k[0, :, head // 2] @ q[0, t, head] / np.sqrt(q.shape[-1])
        kept = np.array(sorted(np.flatnonzero(same), key=lambda j: -scores[j])[:best])
        weights = np.exp(scores[kept] - scores[kept].max())
        want = weights @ v[0, kept, head // 2] / weights.sum()
        np.testing.assert_allclose(got[0, t, head], want, atol=2e-6)


@pytest.mark.parametrize("k", [1, 3, 40])
def test_kth_largest_is_the_sorts(k):
    x = np.float32(np.random.default_rng(0).normal(size=(3, 5, 40)) * 10.0 ** np.arange(-20, 20))
    x[0, 0, :30] = -np.inf
    x[0, 1] = 0.5
    np.testing.assert_array_equal(topk.kth_largest(x, k), np.sort(x, axis=-1)[..., -k][..., None])


def test_moba_reads_its_own_block_and_the_best():
    size, best = 4, 3
    q, k, v = (np.asarray(x) for x in tensors())
    y = np.asarray(jax.jit(lambda *qkv: moba.forward(*qkv, seq=row(), size=size, best=best)[0])(q, k, v))
    start = 0
    for length in LENGTHS:
        for t in (0, length // 2, length - 1):
            for head in range(4):
                keys, values = (x[0, start : start + length, head // 2] for x in (k, v))
                query = q[0, start + t, head]
                gates = [keys[n * size : (n + 1) * size].mean(axis=0) @ query for n in range(t // size)]
                blocks = [t // size, *sorted(range(t // size), key=lambda n: -gates[n])[: best - 1]]
                kept = [j for j in range(t + 1) if j // size in blocks]
                scores = keys[kept] @ query / np.sqrt(q.shape[-1])
                weights = np.exp(scores - scores.max())
                want = weights @ values[kept] / weights.sum()
                np.testing.assert_allclose(y[0, start + t, head], want, atol=2e-6)
        start += length


@pytest.mark.parametrize("last, random", [(12, 3), (6, 3), (4, 1), (3, 3), (2, 3)])
def test_random_blocks_are_far_different_and_as_many_as_there_are(last, random):
    number = jnp.arange(13)  # those after the last mean nothing
    drawn = np.asarray(DRAW(7, 3, number, jnp.full_like(number, last), random))
    for i in range(1, last):
        free = {j for j in range(1, last) if abs(i - j) > 1}
        for head in range(3):
            blocks = [j for j in drawn[i, head] if j >= 0]
            assert len(blocks) == len(set(blocks)) == min(random, len(free)) and set(blocks) <= free


def test_random_blocks_are_the_seeds_and_equally_likely():
    number, heads = jnp.full((), 5), 6000
    drawn = [np.asarray(DRAW(seed, heads, number, number + 4, 2)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert 0.7 < np.mean(drawn[0] != drawn[2])
    sets, counts = np.unique(np.sort(drawn[0], axis=-1), axis=0, return_counts=True)
    # Two of 1, 2, 3, 7, 8: ten pairs; within five deviations.
    assert len(sets) == 10 and np.abs(counts - heads / 10).max() < 5 * np.sqrt(heads / 10)


@pytest.mark.parametrize("sizes", [(4, 2, 8, 5, 6, 16), (6, 2, 4, 6, 9, 64)])
def test_native_sparse_is_its_reference_where_blocks_overlap(sizes):
    """The laws need blocks of one token, for their shortest segments have two."""
    sizes, seq = native_sparse.Sizes(*sizes), row()
    q, k, v = tensors(groups=6)
    keys = iter(jax.random.split(jax.random.key(1), 9))
    shapes = ((sizes.compress, 6), (sizes.compress, 6, 12), (12, 6))
    squeezes = tuple(
        native_sparse.Squeeze(*(jax.random.normal(next(keys), shape) / 3 for shape in shapes)) for _ in "kv"
    )
    gate = jax.nn.sigmoid(jax.random.normal(next(keys), (1, TIME, 4, 3)))
    real = (seq.segment_BT > 0)[..., None, None]

    def run(form):
        def loss(*inputs):
            y = jnp.where(real, form(*inputs), 0.0)
            return jnp.sum(y * jnp.cos(jnp.arange(y.size).reshape(y.shape))), y

        return jax.jit(jax.value_and_grad(loss, range(5), has_aux=True))(q, k, v, gate, squeezes)

    got = run(lambda *inputs: native_sparse.forward(*inputs, seq=seq, sizes=sizes)[0])
    want = run(functools.partial(native_sparse.reference, seq=seq, sizes=sizes))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, np.abs(b).max()))


@pytest.mark.parametrize("capacity", [TIME, 32])
def test_native_sparse_streams_where_blocks_overlap(capacity):
    """Compressed blocks are made once, of tokens of several calls; a segment that fits the state is whole."""
    options = {"compress_size": 4, "compress_stride": 2, "select_size": 8, "selected": 4, "window": 6}
    mixer = make("native_sparse", options, {"heads": 4, "kv_heads": 2, "head_width": 6})
    x, seq = jax.random.normal(jax.random.key(0), (1, TIME, 8)), row()
    params = jax.jit(mixer.init)(jax.random.key(1), x, seq)
    step = jax.jit(mixer.apply)
    want, state, got = step(params, x, seq)[0], mixer.init_state(1, capacity), []
    edges = [0, 1, 2, 13, 24, 35, 36, 37, 48, TIME]  # pieces of two sizes, for each is a compilation
    for start, end in zip(edges, edges[1:]):
        piece = Seq(*(part[:, start:end] for part in seq[:2]))
        y, state = step(params, x[:, start:end], piece, state)
        got.append(y)
    np.testing.assert_allclose(np.concatenate(got, axis=1), want, atol=2e-5)


@pytest.mark.parametrize("name", ["moba", "native_sparse"])
def test_decoding_reads_the_chosen_blocks_alone(name):
    """A token costs less than half of the products with all keys."""
    mixer = make(name, {}, {"heads": 2, "kv_heads": 1, "head_width": 16})
    x, seq, slots = jax.ShapeDtypeStruct((1, 1, 16), jnp.float32), whole(1, 1, 32767), 32768
    params = jax.eval_shape(mixer.init, jax.random.key(0), jnp.zeros((1, 1, 16)), whole(1, 1))
    state = jax.eval_shape(lambda: mixer.init_state(1, slots))
    spent = flops(lambda params, x, state: mixer.apply(params, x, seq, state)[0], params, x, state)
    assert spent < (2 * 2 * slots * 2 * 16) / 2


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_pairs_meet_their_blocks_in_any_chunk(chunk):
    choice = jax.random.randint(jax.random.key(0), (2, 50), 0, 8)  # of 7 blocks, 7 is none
    routes = jax.tree.map(np.asarray, jax.jit(lambda choice: chosen.route(choice, 7, chunk))(choice))
    for sheet in range(2):
        pairs = routes.pair_AXC[sheet].ravel()
        for pair, block in enumerate(np.asarray(choice[sheet])):
            slot = routes.slot_AR[sheet, pair]
            assert (slot == pairs.size) == (block == 7)
            if block < 7:
                assert pairs[slot] == pair and routes.block_AX[sheet, slot // chunk] == block
        assert (pairs < 50).sum() == (np.asarray(choice[sheet]) < 7).sum()


@pytest.mark.parametrize(
    "name, field, value",
    [
        ("sinks", "sinks", 0),
        ("dilated", "dilations", ()),
        ("dilated", "dilations", (1, 0)),
        ("longformer", "global_tokens", 0),
        ("strided", "combine", "head"),
        ("fixed", "columns", 129),
        ("topk", "best", 0),
        ("moba", "block_size", 0),
        ("bigbird", "random_blocks", 0),
        ("native_sparse", "select_size", 65),
        ("native_sparse", "selected", 3),
    ],
)
def test_bad_fields_are_refused(name, field, value):
    with pytest.raises(FieldError, match=field):
        mode = {"bidirectional_mode": name in ("longformer", "bigbird")}
        make(name, {field: value}, {"heads": 2, "head_width": 4} | mode)
