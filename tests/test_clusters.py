"""Attention within clusters: buckets, centroids, and Reformer's own layer as a peer."""

from __future__ import annotations

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastformer.attention import make
from fastformer.attention.clusters import Chunks, by_group
from fastformer.attention.gating import unit
from fastformer.attention.lsh import forward, hashes, rotations
from fastformer.attention.routing import also_minimise, nearest, spread
from fastformer.core.errors import FieldError
from fastformer.core.seq import Seq, whole

WIDTH, HEADS, HEAD, TIME = 32, 4, 8, 64


def layer(name, fields, **shared):
    mixer = make(name, fields, {"heads": HEADS, "head_width": HEAD, **shared})
    x, seq = jax.random.normal(jax.random.key(0), (2, TIME, WIDTH)), whole(2, TIME)
    return mixer, nn.unbox(jax.jit(mixer.init)(jax.random.key(1), x, seq)["params"]), x


def test_rotations_follow_the_seed_and_differ_by_head_and_round():
    one = rotations(2, 8, 3, 4, (0, 0))
    assert np.array_equal(one, rotations.__wrapped__(2, 8, 3, 4, (0, 0)))
    assert not np.array_equal(one, rotations(2, 8, 3, 4, (1, 0)))
    flat = one.reshape(6, -1)
    assert all(np.abs(flat[a] - flat[b]).max() > 0.1 for a in range(6) for b in range(a))


def test_near_vectors_share_a_bucket_and_far_ones_do_not():
    x = jax.random.normal(jax.random.key(0), (1, 400, 1, 16))
    near = x + 0.1 * jax.random.normal(jax.random.key(1), x.shape)
    turns = rotations(1, 16, 8, 8, (0, 0))
    base = hashes(x, turns)
    assert np.mean(base == hashes(near, turns)) > 0.8
    assert np.mean(base == hashes(-x, turns)) == 0.0
    assert abs(np.mean(base == hashes(x[:, ::-1], turns)) - 1 / 8) < 0.04
    assert np.array_equal(base, hashes(unit(x), turns))


def test_groups_are_sorted_and_ranked():
    segment = jnp.asarray([[2, 2, 2, 2, 0, 5, 5, 5]])
    position = jnp.asarray([[0, 1, 2, 3, 0, 0, 1, 2]])
    cluster = jnp.asarray([[1, 0, 1, 1, 0, 1, 1, 0]])
    got = by_group(cluster, Seq(segment, position)).unsorted()
    group, rank = (np.asarray(x)[0].tolist() for x in (got.segment_BT, got.position_BT))
    assert rank[:4] == [0, 0, 1, 2] and rank[5:] == [0, 1, 0]
    assert group[0] == group[2] == group[3] and group[4] == 0 and group[5] == group[6]
    assert len({group[0], group[1], group[5], group[7]}) == 4


def test_chunks_are_seen_as_published():
    """The query's own chunk and the one before, without itself (section 2, figure 2)."""
    seq = whole(1, 12)
    seen = np.asarray(Chunks(True, 3).visible(seq, seq))[0]
    assert np.flatnonzero(seen[7]).tolist() == [3, 4, 5, 6]
    both = np.asarray(Chunks(False, 3).visible(seq, seq))[0]
    assert np.flatnonzero(both[4]).tolist() == [0, 1, 2, 3, 5, 6, 7, 8]


def test_centroids_go_to_the_mean_of_their_tokens():
    centre = jnp.asarray([[[4.0, 0.0], [-4.0, 0.0]]])
    noise = jax.random.normal(jax.random.key(0), (1, 200, 1, 2))
    x = noise + jnp.take(centre[0], jnp.arange(200) % 2, axis=0)[None, :, None]
    seq, mu = whole(1, 200), jnp.asarray([[[1.0, 1.0], [-1.0, 1.0]]])

    def loss(x, mu):
        return jnp.sum(0.0 * also_minimise(x, spread(x, mu, nearest(x, mu), seq)))

    step = jax.jit(jax.grad(loss, (0, 1)))
    for _ in range(100):
        pull, move = step(x, mu)
        assert not np.any(pull)
        mu = mu - 0.2 * move
    means = np.stack([np.asarray(x)[0, n::2, 0].mean(axis=0) for n in (0, 1)])
    np.testing.assert_allclose(mu[0], means, atol=0.05)


@pytest.mark.parametrize(
    "name, fields", [("lsh", {"buckets": 3}), ("lsh", {"rounds": 0}), ("routing", {"window": 0})]
)
def test_bad_fields_are_refused(name, fields):
    with pytest.raises(FieldError, match=next(iter(fields))):
        layer(name, fields)


@pytest.mark.oracle
def test_lsh_in_one_bucket_is_reformers_layer():
    """Two rounds, chunks of 16. Theirs also sees across the borders of buckets, so all is in one here."""
    torch = pytest.importorskip("torch", reason="pip install -r .ci/oracles.txt")
    reformer = pytest.importorskip(
        "transformers.models.reformer.modeling_reformer", reason="pip install -r .ci/oracles.txt"
    )
    rounds, chunk = 2, 16
    mixer, params, x = layer("lsh", {"rounds": rounds, "chunk": chunk})
    config = types.SimpleNamespace(
        lsh_attn_chunk_length=chunk, num_hashes=rounds, num_buckets=2, lsh_num_chunks_before=1,
        lsh_num_chunks_after=0, hash_seed=0, is_decoder=True, max_position_embeddings=TIME,
        lsh_attention_probs_dropout_prob=0.0, num_attention_heads=HEADS, attention_head_size=HEAD,
        hidden_size=WIDTH,
    )  # fmt: skip
    peer = reformer.LSHSelfAttention(config).eval()
    weights = {"query_key": params["query"]["weight"], "value": params["value"]["weight"]}
    for name, weight in weights.items():
        flat = np.asarray(weight).reshape(WIDTH, HEADS * HEAD).T
        getattr(peer, name).weight.data = torch.tensor(flat.copy())
    offset = np.arange(rounds).reshape(1, 1, rounds, 1) * 2
    given = np.broadcast_to(offset, (2, HEADS, rounds, TIME)).reshape(2, HEADS, -1)
    want = peer(torch.tensor(np.array(x)), buckets=torch.tensor(given.copy())).hidden_states.detach().numpy()
    q, v = (jnp.einsum("BTD,DHK->BTHK", x, weight) for weight in weights.values())
    _, k, buckets = mixer.clusters(q, whole(2, TIME))
    got, _ = forward(q, k, v, jnp.zeros_like(buckets), seq=whole(2, TIME), chunk=chunk)
    # The first token sees itself only; their float32 weight for it, of a score of -1e5, is off by 2e-3.
    np.testing.assert_allclose(got.reshape(2, TIME, -1)[:, 1:], want[:, 1:], atol=1e-4)
    np.testing.assert_allclose(got[:, 0], v[:, 0], atol=1e-6)
    assert np.abs(want).max() > 0.5
