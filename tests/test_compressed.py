"""Attention to a few summaries of a segment, against the papers' equations in float64."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastformer.attention import luna, make, nystrom
from fastformer.core.errors import FieldError
from fastformer.core.seq import Seq, whole

SHARED = {"heads": 4, "kv_heads": 2, "head_width": 8, "length": 64}
BOTH = {"bidirectional_mode": True}
TIME, GROUPS = 30, 2


def parts(seed: int = 0, time: int = TIME, scale: float = 1.0):
    """Queries of 4 heads, keys and values of 2."""
    keys = jax.random.split(jax.random.key(seed), 3)
    return [scale * jax.random.normal(key, (1, time, heads, 8)) for key, heads in zip(keys, (4, 2, 2))]


def exact(*arrays):
    return [np.asarray(x, np.float64)[0] for x in arrays]


def softmax(x: np.ndarray, axis: int = -1) -> np.ndarray:
    x = np.exp(x - x.max(axis=axis, keepdims=True))
    return x / x.sum(axis=axis, keepdims=True)


def near(got, want, tolerance: float = 2e-5) -> None:
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=tolerance * np.abs(want).max())


# Linformer


@pytest.mark.parametrize(
    "share, shapes",
    [
        ("none", {"key_rows": (64, 2, 6), "value_rows": (64, 2, 6)}),
        ("heads", {"key_rows": (64, 1, 6), "value_rows": (64, 1, 6)}),
        ("keys_and_values", {"key_rows": (64, 1, 6)}),
    ],
)
def test_linformer_projects_along_time(share, shapes):
    """softmax(q (E k)^T / sqrt(K)) (F v), E and F of as many columns as the row has tokens."""
    mixer = make("linformer", {"rank": 6, "share": share}, SHARED | BOTH)
    x, seq = jax.random.normal(jax.random.key(1), (1, TIME, 16)), whole(1, TIME)
    variables = nn.unbox(mixer.init(jax.random.key(0), x, seq))
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    assert {name: leaf.shape for name, leaf in params.items() if name.endswith("_rows")} == shapes
    tables = (params["key_rows"], params.get("value_rows", params["key_rows"]))

    row, want = exact(x)[0], np.zeros((TIME, 16))
    for head in range(4):
        group = head // 2
        e, f = (table[:TIME, group % table.shape[1]] for table in tables)
        heads = (("query", head), ("key", group), ("value", group))
        q, k, v = (row @ params[name]["weight"][:, at] for name, at in heads)
        want += softmax(q @ (e.T @ k).T / np.sqrt(8)) @ (f.T @ v) @ params["out"]["weight"][head]
    near(mixer.apply(variables, x, seq)[0][0], want)


def test_linformer_refuses_rows_without_weights():
    mixer = make("linformer", {}, SHARED | BOTH)
    with pytest.raises(FieldError, match="length: 64 is not allowed"):
        jax.eval_shape(mixer.init, jax.random.key(0), jnp.zeros((1, 65, 16)), whole(1, 65))


# Luna


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_luna_packs_and_unpacks(scale):
    """Y_P = softmax(p k^T) (k, v), y = softmax(q Y_Pk^T) Y_Pv (2106.01540, eq. 4-5)."""
    q, k, v = parts()
    pack = scale * jax.random.normal(jax.random.key(5), (1, TIME, GROUPS, 3))
    got, _ = luna.forward(q, k, v, pack, seq=whole(1, TIME), causal=False)
    (q, k, v, pack), want = exact(q, k, v, pack), np.zeros((TIME, 4, 8))
    for head in range(4):
        group = head // 2
        packed = softmax(pack[:, group], axis=0).T
        want[:, head] = softmax(q[:, head] @ (packed @ k[:, group]).T / np.sqrt(8)) @ (packed @ v[:, group])
    near(got[0], want)


def test_causal_luna_averages_what_is_packed_so_far():
    """Eq. 7-9: sums up to t divided by t, with an activation of each token alone in place of the softmax."""
    q, k, v = parts()
    pack = jax.random.normal(jax.random.key(5), (1, TIME, GROUPS, 3))
    got, _ = luna.forward(q, k, v, pack, seq=whole(1, TIME))
    (q, k, v, pack), want = exact(q, k, v, pack), np.zeros((TIME, 4, 8))
    weight = np.log2(1 + 2**pack)
    for t, head in np.ndindex(TIME, 4):
        group = head // 2
        packed = weight[: t + 1, group].T / (t + 1)
        chosen = softmax(packed @ k[: t + 1, group] @ q[t, head] / np.sqrt(8))
        want[t, head] = chosen @ packed @ v[: t + 1, group]
    near(got[0], want)


# Nyströmformer


def test_nystrom_cuts_segments_into_parts_of_near_equal_size():
    segment = jnp.asarray([[1] * 4 + [0] + [2] * 10 + [3] * 15], jnp.int32)
    position = jnp.asarray([[*range(4), 0, *range(10), *range(15)]], jnp.int32)
    where = nystrom.places(Seq(segment, position), 4)
    assert where.wide_BT[0].tolist() == [False] * 5 + [True] * 25
    assert where.slot_BT[0, 5:].tolist() == [0] * 10 + [1] * 15
    found = [where.part_BT[0, cut].tolist() for cut in (slice(5, 15), slice(15, 30))]
    assert found == [sorted(parts) for parts in found]
    assert [[parts.count(part) for part in range(4)] for parts in found] == [[3, 2, 3, 2], [4, 4, 4, 3]]


@pytest.mark.parametrize("landmarks", [6, 30])
def test_nystrom_is_softmax_where_its_landmarks_say_all(landmarks):
    """Exact where the tokens of a part are alike, and where each token is its own landmark."""
    q, k, v = parts()
    q, k = (jnp.repeat(x[:, :landmarks], TIME // landmarks, axis=1) for x in (2.0 * q, 2.0 * k))
    got, _ = nystrom.forward(q, k, v, seq=whole(1, TIME), landmarks=landmarks, iterations=20)
    queries, keys, values = exact(q, k, v)
    want = np.zeros((TIME, 4, 8))
    for head in range(4):
        group = head // 2
        want[:, head] = softmax(queries[:, head] @ keys[:, group].T / np.sqrt(8)) @ values[:, group]
    near(got[0], want, 1e-4)


def test_the_inverse_inverts(rng):
    matrix = softmax(4.0 * rng.normal(size=(2, 3, 9, 9))).astype(np.float32)
    want = np.linalg.inv(matrix.astype(np.float64))
    got = nystrom.inverse(jnp.asarray(matrix), 30)
    np.testing.assert_allclose(got, want, atol=1e-3 * np.abs(want).max())


@pytest.mark.parametrize(
    "name, field, value",
    [
        ("linformer", "rank", 0),
        ("linformer", "share", "layers"),
        ("luna", "rank", 0),
        ("nystrom", "landmarks", 0),
        ("nystrom", "iterations", 0),
        ("nystrom", "skip", 4),
    ],
)
def test_bad_fields_are_refused(name, field, value):
    with pytest.raises(FieldError, match=field):
        make(name, {field: value}, SHARED | BOTH)
