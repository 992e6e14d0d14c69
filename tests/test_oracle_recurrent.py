"""Recurrent mixers against transformers' layers: values and all gradients, weights carried over."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle_tools import (
    BATCH,
    HEADS,
    TIME,
    WIDTH,
    agree,
    array,
    inputs,
    mixer_of,
    scattered,
    slope,
    taps,
    turned,
)

from fastformer.attention.decay import forward as decayed
from fastformer.core.seq import whole

pytestmark = pytest.mark.oracle
WHY = "pip install torch==2.13.0 transformers"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)


@pytest.mark.parametrize("groups, state, values", [(1, 16, 8), (2, 8, 16)])
def test_mamba2_is_that_of_transformers(groups, state, values):
    """Values half as wide as the state, as in the published models, and twice."""
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Config, Mamba2Mixer

    config = Mamba2Config(
        num_heads=HEADS, head_dim=values, hidden_size=WIDTH, state_size=state, n_groups=groups,
        expand=HEADS * values // WIDTH,
        chunk_size=16, num_hidden_layers=1, layer_norm_epsilon=1e-6,
    )  # fmt: skip
    layer = scattered(Mamba2Mixer(config, 0))
    layer.A_log.data = torch.linspace(-3.0, 1.0, HEADS)
    inner, keys = HEADS * values, groups * state
    layer.norm.group_size = inner  # theirs norms each group by itself, ours all of them together

    def carry(read):
        projected = np.split(read(layer.in_proj.weight), np.cumsum([inner, inner, keys, keys]))
        gate, v, k, q, step = projected

        def ordered(xbc):
            """Return features in the order q, k, v from x, B, C."""
            v, k, q = np.split(xbc, [inner, inner + keys], axis=-1)
            return np.concatenate([q, k, v], axis=-1)

        return {
            "query": {"weight": turned(q, groups, state)},
            "key": {"weight": turned(k, groups, state)},
            "value": {"weight": turned(v, HEADS, values)},
            "conv": {
                "taps": ordered(taps(read(layer.conv1d.weight))),
                "bias": ordered(read(layer.conv1d.bias)),
            },
            "step": {"weight": turned(step, HEADS)},
            "step_bias": read(layer.dt_bias),
            "log_rate": read(layer.A_log),
            "skip": read(layer.D),
            "swish_gate": {"weight": turned(gate, HEADS, values)},
            "inner_norm": {"scale": read(layer.norm.weight)},
            "out": {"weight": turned(read(layer.out_proj.weight), WIDTH).reshape(HEADS, values, WIDTH)},
        }

    options = {"value_expand": values / state}
    agree(mixer_of("mamba2", options, kv_heads=groups, head_width=state), carry, layer)


def test_mlstm_is_that_of_transformers():
    from transformers.models.xlstm.modeling_xlstm import xLSTMConfig, xLSTMLayer

    config = xLSTMConfig(hidden_size=WIDTH, num_heads=HEADS, num_hidden_layers=1, chunk_size=16)
    layer = scattered(xLSTMLayer(config))
    keys, values = WIDTH // HEADS // 2, WIDTH // HEADS

    def carry(read):
        return {
            "query": {"weight": turned(read(layer.q.weight), HEADS, keys)},
            "key": {"weight": turned(read(layer.k.weight), HEADS, keys)},
            "value": {"weight": turned(read(layer.v.weight), HEADS, values)},
            "input_gate": {"weight": turned(read(layer.igate_preact.weight), HEADS)},
            "forget_gate": {"weight": turned(read(layer.fgate_preact.weight), HEADS)},
            "input_gate_bias": read(layer.igate_preact.bias),
            "forget_gate_bias": read(layer.fgate_preact.bias),
            "open": {"weight": turned(read(layer.ogate_preact.weight), HEADS, values)},
            "norm_scale": read(layer.multihead_norm.weight).reshape(HEADS, values),
            "out": {"weight": turned(read(layer.out_proj.weight), WIDTH).reshape(HEADS, values, WIDTH)},
        }

    mixer = mixer_of("mlstm", {"value_expand": 2, "gate_cap": 15.0}, head_width=keys)
    agree(mixer, carry, lambda x: layer(x)[0])


def test_rg_lru_is_that_of_recurrent_gemma():
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import (
        RecurrentGemmaConfig,
        RecurrentGemmaRecurrentBlock,
    )

    width = 12
    config = RecurrentGemmaConfig(
        hidden_size=WIDTH, lru_width=HEADS * width, num_attention_heads=HEADS, num_key_value_heads=1,
        num_hidden_layers=1,
    )  # fmt: skip
    layer = scattered(RecurrentGemmaRecurrentBlock(config, 0))
    for linear in (layer.linear_x, layer.linear_y, layer.linear_out):
        linear.bias.data.zero_()  # ours have none
    lru = layer.rg_lru
    torch.nn.init.uniform_(lru.recurrent_param, -4.0, -1.0, generator=torch.Generator().manual_seed(1))

    def carry(read):
        return {
            "value": {"weight": turned(read(layer.linear_x.weight), HEADS, width)},
            "taps": taps(read(layer.conv_1d.weight)),
            "taps_bias": read(layer.conv_1d.bias),
            "rate": read(lru.recurrent_param).reshape(HEADS, width),
            "recurrence_gate": {"weight": read(lru.recurrent_gate_weight)},
            "recurrence_gate_bias": read(lru.recurrent_gate_bias),
            "input_gate": {"weight": read(lru.input_gate_weight)},
            "input_gate_bias": read(lru.input_gate_bias),
            "branch": {"weight": turned(read(layer.linear_y.weight), HEADS, width)},
            "out": {"weight": turned(read(layer.linear_out.weight), WIDTH).reshape(HEADS, width, WIDTH)},
        }

    positions = torch.arange(TIME)[None].expand(BATCH, TIME)
    oracle = lambda x: layer(x, positions, None, use_cache=False)[0]  # noqa: E731
    agree(mixer_of("rg_lru", {}, head_width=width), carry, oracle)


def test_decay_is_lightning_attention():
    """MiniMax's layer around our decayed attention: SiLU on q, k, v, decays by head and layer, one norm."""
    from transformers.models.minimax.modeling_minimax import MiniMaxConfig, MiniMaxLightningAttention

    keys = WIDTH // HEADS
    config = MiniMaxConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=keys, block_size=16,
        num_hidden_layers=4, layer_types=["linear_attention"] * 4,
    )  # fmt: skip
    layer = scattered(MiniMaxLightningAttention(config, 1))
    slope_H = array(layer.slope_rate).reshape(-1)
    weights = {
        name: array(getattr(layer, name).weight) for name in ("qkv_proj", "norm", "output_gate", "out_proj")
    }

    def ours(x):
        qkv = jax.nn.silu(jnp.einsum("BTD,RD->BTR", x, weights["qkv_proj"]))
        q, k, v = jnp.split(qkv.reshape(BATCH, TIME, HEADS, 3 * keys), 3, axis=-1)
        log = jnp.broadcast_to(-slope_H.reshape(1, 1, HEADS, 1), (BATCH, TIME, HEADS, 1))
        y = decayed(q * keys**0.5, k, v, log, seq=whole(BATCH, TIME))[0].reshape(BATCH, TIME, WIDTH)
        y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-6) * weights["norm"].reshape(1, 1, -1)
        y *= jax.nn.sigmoid(jnp.einsum("BTD,RD->BTR", x, weights["output_gate"]))
        return jnp.einsum("BTR,DR->BTD", y, weights["out_proj"])

    tensor = torch.tensor(inputs(), requires_grad=True)
    want = layer(tensor, None, None)[0]
    pull_by = np.cos(np.arange(tensor.numel())).reshape(tensor.shape).astype(np.float32)
    (want * torch.tensor(pull_by)).sum().backward()
    y, pull = jax.vjp(ours, jnp.asarray(inputs()))
    for got, expected in ((y, array(want)), (pull(jnp.asarray(pull_by))[0], slope(tensor))):
        np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)
