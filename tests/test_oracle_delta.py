"""Delta-rule mixers against transformers' layers, and where it has none against the paper in torch."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest
from oracle_tools import HEADS, TIME, WIDTH, agree, array, drawn, inputs, mixer_of, scattered, taps, turned

from fastformer.core.seq import Seq, whole

pytestmark = pytest.mark.oracle
WHY = "pip install torch==2.13.0 transformers"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)

KEY = 8
RATES = torch.linspace(-5.0, 1.0, HEADS)  # of decays: from a memory of hundreds of tokens to one of few


def qwen():
    """Return a gated delta layer of Qwen3-Next, its config, and how to read it into our mixer."""
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextConfig, Qwen3NextGatedDeltaNet

    config = Qwen3NextConfig(
        hidden_size=WIDTH, num_hidden_layers=1, layer_types=["linear_attention"], linear_num_key_heads=HEADS,
        linear_num_value_heads=HEADS, linear_key_head_dim=KEY, linear_value_head_dim=KEY, rms_norm_eps=1e-6,
    )  # fmt: skip
    layer = scattered(Qwen3NextGatedDeltaNet(config, 0))
    layer.A_log.data = RATES.clone()

    def carry(read):
        # [in, heads, what a head has]: a head's query, key, value and gate stand side by side.
        qkvz = turned(read(layer.in_proj_qkvz.weight), HEADS, 4, KEY)
        strength, step = np.moveaxis(turned(read(layer.in_proj_ba.weight), HEADS, 2), 2, 0)
        return {
            **{name: {"weight": qkvz[:, :, i]} for i, name in enumerate(("query", "key", "value"))},
            "swish_gate": {"weight": qkvz[:, :, 3]},
            "conv": {"taps": taps(read(layer.conv1d.weight))},
            "strength": {"weight": strength},
            "step": {"weight": step},
            "step_bias": read(layer.dt_bias),
            "log_rate": read(layer.A_log),
            "head_norm": {"scale": read(layer.norm.weight)},
            "out": {"weight": turned(read(layer.out_proj.weight), WIDTH).reshape(HEADS, KEY, WIDTH)},
        }

    return layer, config, carry


def kimi():
    """Return a delta layer of Kimi Linear, its config, and how to read it into our mixer."""
    from transformers.models.kimi_linear.modeling_kimi_linear import (
        KimiLinearConfig,
        KimiLinearDeltaAttention,
    )

    config = KimiLinearConfig(
        hidden_size=WIDTH, num_hidden_layers=1, layer_types=["linear_attention"], linear_num_heads=HEADS,
        linear_head_dim=KEY, rms_norm_eps=1e-6,
    )  # fmt: skip
    layer = scattered(KimiLinearDeltaAttention(config, 0))
    layer.forget_gate.A_log.data = RATES.reshape(1, 1, HEADS, 1).clone()

    def carry(read):
        gate, wide = layer.forget_gate, (HEADS, KEY)
        return {
            "query": {"weight": turned(read(layer.q_proj.weight), *wide)},
            "key": {"weight": turned(read(layer.k_proj.weight), *wide)},
            "value": {"weight": turned(read(layer.v_proj.weight), *wide)},
            "conv": {"taps": taps(read(layer.conv1d.weight))},
            "strength": {"weight": turned(read(layer.b_proj.weight), HEADS)},
            "step_down": {"weight": turned(read(gate.f_a_proj.weight), KEY)},
            "step_up": {"weight": turned(read(gate.f_b_proj.weight), *wide)},
            "step_bias": read(gate.dt_bias).reshape(wide),
            "log_rate": read(gate.A_log).reshape(HEADS),
            "open_down": {"weight": turned(read(layer.g_a_proj.weight), KEY)},
            "open_up": {"weight": turned(read(layer.g_b_proj.weight), *wide)},
            "head_norm": {"scale": read(layer.o_norm.weight)},
            "out": {"weight": turned(read(layer.o_proj.weight), WIDTH).reshape(*wide, WIDTH)},
        }

    return layer, config, carry


def olmo(negative, decays):
    """Return a gated delta layer of OLMo Hybrid, with wide values, and how to read it into our mixer."""
    from transformers.models.olmo_hybrid.modeling_olmo_hybrid import (
        OlmoHybridConfig,
        OlmoHybridGatedDeltaNet,
    )

    config = OlmoHybridConfig(
        hidden_size=WIDTH, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=HEADS, linear_num_value_heads=HEADS, linear_key_head_dim=KEY,
        linear_value_head_dim=2 * KEY, linear_allow_neg_eigval=negative,
    )  # fmt: skip
    layer = scattered(OlmoHybridGatedDeltaNet(config, 0))
    layer.o_norm.variance_epsilon = 1e-6
    layer.A_log.data = RATES.clone() if decays else torch.full((HEADS,), -math.inf)  # exp(-inf) of a step

    def carry(read):
        keys, wide = (HEADS, KEY), (HEADS, 2 * KEY)
        params = {
            "query": {"weight": turned(read(layer.q_proj.weight), *keys)},
            "key": {"weight": turned(read(layer.k_proj.weight), *keys)},
            "value": {"weight": turned(read(layer.v_proj.weight), *wide)},
            "conv": {"taps": taps(read(layer.conv1d.weight))},
            "strength": {"weight": turned(read(layer.b_proj.weight), HEADS)},
            "swish_gate": {"weight": turned(read(layer.g_proj.weight), *wide)},
            "head_norm": {"scale": read(layer.o_norm.weight)},
            "out": {"weight": turned(read(layer.o_proj.weight), WIDTH).reshape(*wide, WIDTH)},
        }
        if not decays:
            return params
        step = turned(read(layer.a_proj.weight), HEADS)
        return {
            **params,
            "step": {"weight": step},
            "step_bias": read(layer.dt_bias),
            "log_rate": read(layer.A_log),
        }

    return layer, carry


def test_gated_delta_is_that_of_qwen3_next():
    layer, _, carry = qwen()
    agree(mixer_of("gated_delta", {"value_expand": 1.0}), carry, layer)


@pytest.mark.parametrize("name, negative", [("delta", False), ("delta", True), ("gated_delta", True)])
def test_delta_rules_are_those_of_olmo_hybrid(name, negative):
    """Its gated layer, and with decays of one the plain delta rule, for both ranges of eigenvalues."""
    layer, carry = olmo(negative, decays=name == "gated_delta")
    options = {"negative": negative, "norm_gate": True, "value_expand": 2.0}
    agree(mixer_of(name, options), carry, layer)


def test_kimi_delta_is_that_of_kimi_linear():
    layer, _, carry = kimi()
    agree(mixer_of("kimi_delta", {}), carry, layer)


@pytest.mark.parametrize("name, build", [("gated_delta", qwen), ("kimi_delta", kimi)])
def test_streams_are_those_of_their_caches(name, build):
    """A prefill, then token by token: outputs, and what is kept of the past."""
    layer, config, carry = build()
    mixer, params, x, start = mixer_of(name, {"value_expand": 1.0}), carry(array), inputs(), TIME - 6
    cache, state = transformers.DynamicCache(config=config), mixer.init_state(len(x), TIME)
    step = jax.jit(lambda x, position, state: mixer.apply({"params": params}, x, _at(x, position), state))
    edges = [0, start, *range(start + 1, TIME + 1)]
    for begin, end in zip(edges, edges[1:]):
        with torch.no_grad():
            want = layer(torch.tensor(x[:, begin:end]), cache_params=cache)
        y, state = step(x[:, begin:end], begin, state)
        np.testing.assert_allclose(y, array(want), atol=1e-4, rtol=0)
    memory_BGKP = array(cache.get_recurrent_state(0, state_idx=0))
    assert np.abs(memory_BGKP).max() > 0.1
    np.testing.assert_allclose(state.mixer.memory_BGKP, memory_BGKP, atol=1e-4, rtol=0)


def _at(x, position):
    return Seq(*(part + shift for part, shift in zip(whole(*x.shape[:2]), (0, position))))


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def normed(y, scale):
    return y / torch.sqrt((y * y).mean(-1, keepdim=True) + 1e-6) * scale


def convolved(x, tap_WR):
    """Return the SiLU of a causal convolution of features [B, T, R]; taps newest first."""
    weight = tap_WR.flip(0).T[:, None]
    padded = torch.nn.functional.pad(x.transpose(1, 2), (len(tap_WR) - 1, 0))
    return torch.nn.functional.silu(torch.conv1d(padded, weight, groups=len(weight))).transpose(1, 2)


@pytest.mark.parametrize("steps, gated", [(3, False), (2, True)])
def test_delta_product_is_its_equation(steps, gated):
    """S_t = g A_t S_{t-1} + B_t of 2502.10297, A a product of reflections, B what each leaves of a write."""
    mixer = mixer_of("delta_product", {"steps": steps, "gated": gated})
    weights = drawn(mixer)

    def oracle(x):
        x = x.double()
        flat = [torch.einsum("btd,dhk->bthk", x, weights[n]["weight"]) for n in ("query", "key", "value")]
        joined = convolved(torch.cat([part.flatten(2) for part in flat], dim=-1), weights["conv"]["taps"])
        q, k, v = joined.split([part[0, 0].numel() for part in flat], dim=-1)
        q = unit(q.reshape(*x.shape[:2], HEADS, KEY)) / math.sqrt(KEY)
        k = unit(k.reshape(*x.shape[:2], steps, HEADS, KEY))
        v = v.reshape(*x.shape[:2], steps, HEADS, KEY)
        beta = 2 * torch.sigmoid(x @ weights["strength"]["weight"]).reshape(*x.shape[:2], steps, HEADS)
        decay = torch.ones(*x.shape[:2], HEADS, dtype=torch.float64)
        if gated:
            size = torch.nn.functional.softplus(x @ weights["step"]["weight"] + weights["step_bias"])
            decay = torch.exp(-torch.exp(weights["log_rate"]) * size)
        eye = torch.eye(KEY, dtype=torch.float64)
        state, ys = torch.zeros(len(x), HEADS, KEY, KEY, dtype=torch.float64), []
        for t in range(x.shape[1]):
            product, writes = eye, 0.0
            for j in reversed(range(steps)):
                key, strength = k[:, t, j], beta[:, t, j][..., None, None]
                write = strength * key[..., :, None] * v[:, t, j][..., None, :]
                writes = writes + product @ write
                product = product @ (eye - strength * key[..., :, None] * key[..., None, :])
            state = decay[:, t][..., None, None] * (product @ state) + writes
            ys.append((state.transpose(-1, -2) @ q[:, t][..., None])[..., 0])
        y = normed(torch.stack(ys, dim=1), weights["head_norm"]["scale"])
        gate = torch.einsum("btd,dhp->bthp", x, weights["swish_gate"]["weight"])
        y = y * torch.nn.functional.silu(gate)
        return torch.einsum("bthp,hpd->btd", y, weights["out"]["weight"])

    agree(mixer, lambda read: jax.tree.map(read, weights), oracle)


def test_rwkv7_is_its_equations():
    """The time mixing of 2503.14456, section 4, as in a first layer, where values have no residual."""
    mixer = mixer_of("rwkv7", {"gate_rank": 5})
    weights = drawn(mixer)

    def low_rank(name, x, activation):
        down, up = weights[f"{name}_down"]["weight"], weights[f"{name}_up"]["weight"]
        return torch.einsum("btr,rhk->bthk", activation(x @ down), up)

    def oracle(x):
        x = x.double()
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)

        def mixed(name):
            share = weights[f"{name}_mix"]
            return (1 - share) * x + share * before

        def projected(name):
            return torch.einsum("btd,dhk->bthk", mixed(name), weights[name]["weight"])

        r, k, v = (projected(name) for name in ("query", "key", "value"))
        level = weights["decay_bias"] + low_rank("decay", mixed("decay"), torch.tanh)
        w = torch.exp(-math.exp(-0.5) * torch.sigmoid(level))
        a = torch.sigmoid(weights["rate_bias"] + low_rank("rate", mixed("rate"), lambda h: h))
        g = low_rank("open", mixed("open"), torch.sigmoid)
        removed = unit(k * weights["removal"])
        k = k * (1 - weights["replacement"] + a * weights["replacement"])
        state, ys = torch.zeros(len(x), HEADS, KEY, KEY, dtype=torch.float64), []  # values by keys
        for t in range(x.shape[1]):
            transition = torch.diag_embed(w[:, t])
            transition = transition - removed[:, t][..., :, None] * (a[:, t] * removed[:, t])[..., None, :]
            state = state @ transition + v[:, t][..., :, None] * k[:, t][..., None, :]
            ys.append((state @ r[:, t][..., None])[..., 0])
        flat = torch.stack(ys, dim=1).reshape(-1, HEADS * KEY)
        scale, bias = weights["norm_scale"].flatten(), weights["norm_bias"].flatten()
        y = torch.nn.functional.group_norm(flat, HEADS, scale, bias, eps=64e-5).reshape(v.shape)
        y = g * (y + (r * k * weights["bonus"]).sum(-1, keepdim=True) * v)
        return torch.einsum("bthp,hpd->btd", y, weights["out"]["weight"])

    agree(mixer, lambda read: jax.tree.map(read, weights), oracle)
