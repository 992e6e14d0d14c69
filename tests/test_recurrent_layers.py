"""Whole recurrent layers against their papers, token by token in float64.

The laws compare two forms of a mixer that share its projections, gates and norms; transformers has none of
these four layers.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import numpy as np
import pytest

from fastformer.attention import make
from fastformer.core.seq import whole

TIME, WIDTH, HEADS, KEY = 9, 10, 2, 4


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def rms(x):
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def turned(x):
    """Rotary positions, halves as pairs."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None] * 10000.0 ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def memory(q, k, v, decay, strength=None):
    """Return ``M = (I - b k k^T) diag(a) M + b k v^T``, ``y = M^T q``; without b what is written is added."""
    y, state = np.zeros(v.shape), np.zeros((HEADS, KEY, v.shape[-1]))
    for t, h in np.ndindex(len(q), HEADS):
        state[h] *= np.broadcast_to(decay[t, h], (KEY,))[:, None]
        written = v[t, h]
        if strength is not None:
            written = strength[t, h] * (written - k[t, h] @ state[h])
        state[h] += np.outer(k[t, h], written)
        y[t, h] = q[t, h] @ state[h]
    return y


def retention(x, w):
    """Sun et al. 2023, 2307.08621, eq. 6 to 8: decays 1 - 2^(-5-h), a norm a head, a swish gate."""
    q, k = turned(w(x, "query")) / np.sqrt(KEY), turned(w(x, "key"))
    y = memory(q, k, w(x, "value"), np.tile(1 - 2.0 ** (-5 - np.arange(HEADS)), (TIME, 1)))
    return rms(y) * w["head_norm/scale"] * silu(w(x, "swish_gate"))


def gla(x, w):
    """Yang et al. 2023, 2312.06635, section 4.4: decays sigmoid(x W1 W2 + b)^(1/16)."""
    gate = np.einsum("tr,rhk->thk", x @ w["decay_down/weight"], w["decay_up/weight"]) + w["decay_bias"]
    y = memory(w(x, "query") / np.sqrt(KEY), w(x, "key"), w(x, "value"), sigmoid(gate) ** (1 / 16))
    return rms(y) * w["head_norm/scale"] * silu(w(x, "swish_gate"))


def hgrn2(x, w):
    """Qin et al. 2024, 2404.07904, eq. 9: f forgets, 1 - f writes; a norm over all heads."""
    forget = 0.2 + 0.8 * sigmoid(w(x, "key"))
    y = memory(silu(w(x, "query")), 1 - forget, w(x, "value"), forget)
    return (rms(y.reshape(TIME, -1)) * w["inner_norm/scale"]).reshape(y.shape)


def delta(x, w):
    """Yang et al. 2024, 2406.06484, eq. 2 and section 3.4: SiLU and length one, a norm a head, no gate."""
    q, k = unit(silu(w(x, "query"))) / np.sqrt(KEY), unit(silu(w(x, "key")))
    y = memory(q, k, w(x, "value"), np.ones((TIME, HEADS)), sigmoid(x @ w["strength/weight"]))
    return rms(y) * w["head_norm/scale"]


class Weights(dict):
    """Parameters by path in float64; called, a projection to heads."""

    def __call__(self, x, name):
        return np.einsum("td,dhk->thk", x, self[f"{name}/weight"])


CASES = {"retention": (retention, {}), "gla": (gla, {}), "hgrn2": (hgrn2, {"lower_bound": 0.2})}
CASES["delta"] = (delta, {})


@pytest.mark.parametrize("name", CASES)
def test_a_layer_is_its_papers(rng, name):
    written, options = CASES[name]
    shared = {"heads": HEADS, "head_width": KEY, "short_conv": 0, "positions": "rope"}
    mixer, seq = make(name, options, shared), whole(1, TIME)
    x = np.asarray(jax.random.normal(jax.random.key(0), (1, TIME, WIDTH)))
    params = nn.unbox(jax.jit(mixer.init)(jax.random.key(1), x, seq)["params"])
    params = jax.tree.map(lambda a: np.float32(a + 0.3 * rng.normal(size=a.shape)), params)
    named = {"/".join(key.key for key in path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    weights = Weights({path: np.asarray(leaf, np.float64) for path, leaf in named.items()})
    want = np.einsum("thp,hpd->td", written(np.float64(x[0]), weights), weights["out/weight"])
    got = jax.jit(mixer.apply)({"params": params}, x, seq)[0][0]
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    assert np.abs(want).max() > 0.1
