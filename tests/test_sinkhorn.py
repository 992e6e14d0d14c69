"""Sinkhorn attention against the paper's steps in numpy, block by block."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastformer.attention import make, sinkhorn
from fastformer.core.errors import FieldError
from fastformer.core.seq import Seq

LENGTHS = (19, 3, 13, 7)  # of the segments of one row; then padding
TIME = sum(LENGTHS) + 4
GROUPS, SHARE, WIDTH, RANK = 2, 2, 6, 3


def row():
    segment = np.concatenate([np.full(n, i + 1) for i, n in enumerate(LENGTHS)] + [np.zeros(4)])
    position = np.concatenate([np.arange(n) for n in (*LENGTHS, 4)])
    return Seq(*(jnp.asarray(x[None], jnp.int32) for x in (segment, position)))


def inputs(blocks):
    rng = np.random.default_rng(0)
    shapes = [(GROUPS * SHARE, WIDTH), (GROUPS, WIDTH), (GROUPS, WIDTH), (GROUPS, RANK)]
    *qkv, hidden = (rng.normal(size=(1, TIME, *shape)).astype(np.float32) for shape in shapes)
    return qkv, sinkhorn.Sort(hidden, rng.normal(size=(GROUPS, RANK, blocks)).astype(np.float32))


def balanced(scores, iterations):
    table = np.exp(scores)
    for _ in range(iterations):
        table = table / table.sum(axis=1, keepdims=True)
        table = table / table.sum(axis=0, keepdims=True)
    return table


@pytest.mark.parametrize("blocks", [1, 4, 50])
def test_blocks_are_sorted_and_attended_to(blocks):
    (q, k, v), sort = inputs(blocks)
    sizes = sinkhorn.Sizes(blocks, 0.75, 3)
    got = jax.jit(lambda *qkvs: sinkhorn.forward(*qkvs, seq=row(), sizes=sizes, block=8)[0])(q, k, v, sort)
    want, start = np.zeros(got.shape), 0
    for length in LENGTHS:
        size = -(-length // blocks)
        count = -(-length // size)
        for head in range(GROUPS * SHARE):
            group, here = head // SHARE, slice(start, start + length)
            padded = [(0, count * size - length), (0, 0)]
            keys, values = (
                np.pad(x[0, here, group], padded).reshape(count, size, -1).astype(np.float64) for x in (k, v)
            )
            hidden = sort.hidden_BTGR[0, here, group]
            means = [hidden[i * size : (i + 1) * size].mean(axis=0) for i in range(count)]
            scores = np.maximum(means, 0.0) @ sort.outer_GRN[group, :, :count] / 0.75
            table = balanced(scores.astype(np.float64), 3)
            moved_k, moved_v = (np.einsum("ij,jck->ick", table, x) for x in (keys, values))
            for t in range(length):
                i, end = t // size, min(size, length - t // size * size)
                seen = [
                    np.concatenate([a[i, :end], b[i, :end]]) for a, b in ((keys, moved_k), (values, moved_v))
                ]
                weights = np.exp(seen[0] @ q[0, start + t, head] / np.sqrt(WIDTH))
                want[0, start + t, head] = weights @ seen[1] / weights.sum()
        start += length
    np.testing.assert_allclose(got, want, atol=5e-6)


def test_many_rounds_make_a_doubly_stochastic_matrix():
    _, sort = inputs(4)
    sizes, seq = sinkhorn.Sizes(4, 0.5, 200), row()
    table = np.asarray(sinkhorn.permutation(sort, seq, sinkhorn.places(seq, 4), sizes))[0]
    start = 0
    for length in LENGTHS:
        size = -(-length // 4)
        matrix = table[start : start + length : size].swapaxes(0, 1)  # of each head, blocks by blocks
        count = matrix.shape[1]
        assert np.all(matrix[:, :, count:] == 0)
        for axis in (1, 2):
            np.testing.assert_allclose(matrix[:, :, :count].sum(axis=axis), 1.0, atol=1e-4)
        start += length


@pytest.mark.parametrize("field, value", [("blocks", 0), ("iterations", 0), ("temperature", 0.0)])
def test_bad_fields_are_refused(field, value):
    with pytest.raises(FieldError, match=field):
        make("sinkhorn", {field: value}, {"heads": 2, "head_width": 4, "bidirectional_mode": True})
