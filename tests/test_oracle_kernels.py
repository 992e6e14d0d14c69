"""Kernel attention against an independent implementation in torch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastformer.attention import make, performer
from fastformer.core.seq import whole

torch = pytest.importorskip("torch", reason="pip install torch==2.13.0 transformers")

pytestmark = pytest.mark.oracle

WIDTH, TIME = 24, 37


@pytest.mark.parametrize("causal", [True, False])
def test_performer_is_favor_in_torch(causal):
    """Lemma 1 of the paper in double precision, with our layer's weights and random vectors."""
    shared = {"heads": 4, "head_width": 6, "bidirectional_mode": not causal}
    layer = make("performer", {"features": 16}, shared)
    x = jax.random.normal(jax.random.key(0), (2, TIME, WIDTH))
    variables = layer.init(jax.random.key(1), x, whole(2, TIME))
    weights = {
        name: torch.tensor(np.asarray(leaf["weight"].value), dtype=torch.float64)
        for name, leaf in variables["params"].items()
    }
    vectors = torch.tensor(performer.projections(4, 6, 16, (0, 0)), dtype=torch.float64)
    tensor = torch.tensor(np.asarray(x), dtype=torch.float64, requires_grad=True)

    def phi(x):
        x = x / 6**0.25
        return torch.exp(torch.einsum("bthk,hrk->bthr", x, vectors) - (x * x).sum(-1, keepdim=True) / 2) / 4

    q, k, v = (torch.einsum("btd,dhk->bthk", tensor, weights[name]) for name in ("query", "key", "value"))
    similar = torch.einsum("bthr,bshr->bhts", phi(q), phi(k))
    similar = torch.tril(similar) if causal else similar
    mean = torch.einsum("bhts,bshp->bthp", similar / similar.sum(-1, keepdim=True), v)
    want = torch.einsum("bthp,hpd->btd", mean, weights["out"])
    factor = np.cos(np.arange(want.numel())).reshape(want.shape)
    (want * torch.tensor(factor)).sum().backward()

    def loss(x):
        y = layer.apply(variables, x, whole(2, TIME))[0]
        return jnp.sum(y * jnp.asarray(factor, jnp.float32)), y

    pull, got = jax.grad(loss, has_aux=True)(x)
    np.testing.assert_allclose(got, want.detach().numpy(), atol=1e-4)
    np.testing.assert_allclose(pull, tensor.grad.numpy(), atol=1e-4)
