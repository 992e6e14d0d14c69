"""Exact attention against whole models of transformers: weights carried over, outputs and gradients equal.

The oracle is the attention of a model's layer as the model calls it, so that masks, windows and rotary
positions are transformers' own. Nyströmformer's, which approximates it, is called by itself.
"""

from __future__ import annotations

import numpy as np
import pytest

pytestmark = pytest.mark.oracle
WHY = "pip install torch==2.13.0 transformers"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)

from oracle_tools import HEADS, TIME, WIDTH, agree, mixer_of, scattered, turned  # noqa: E402

GROUPS, HEAD, WINDOW = 2, 8, 11


def layer_of(family: str, number: int = 0, **sizes):
    """Return the attention of layer ``number`` of a tiny model, and what the model does with it to x_BTD."""
    config = getattr(transformers, f"{family}Config")(
        hidden_size=WIDTH,
        intermediate_size=16,
        num_attention_heads=HEADS,
        num_hidden_layers=number + 1,
        vocab_size=8,
        pad_token_id=0,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attn_implementation="eager",
        **sizes,
    )
    model = scattered(getattr(transformers, f"{family}Model")(config))
    layer = model.layers[number]
    layer.input_layernorm = torch.nn.Identity()
    model.layers, seen = torch.nn.ModuleList([layer]), []
    layer.self_attn.register_forward_hook(lambda module, given, returned: seen.append(returned[0]))

    def oracle(x_BTD):
        model(inputs_embeds=x_BTD, use_cache=False)
        return seen[-1]

    return layer.self_attn, oracle


def by_head(read, attention, groups=GROUPS, order=lambda heads: np.arange(heads)):
    """Return query, key, value and output weights, the heads in the ``order`` that ours have."""
    parts = {"query": (attention.q_proj, HEADS), "key": (attention.k_proj, groups)}
    parts["value"] = (attention.v_proj, groups)
    carried = {
        name: {"weight": turned(read(linear.weight), heads, HEAD)[:, order(heads)]}
        for name, (linear, heads) in parts.items()
    }
    return carried | {"out": {"weight": read(attention.o_proj.weight).T.reshape(HEADS, HEAD, WIDTH)}}


def neighbours(heads: int) -> np.ndarray:
    """Return the order of DiffLlama's heads that makes neighbours of the pairs i and i + H/2."""
    return np.arange(heads).reshape(2, -1).T.ravel()


SIZES = {"num_key_value_heads": GROUPS, "head_dim": HEAD}
MISTRAL = {"sliding_window": WINDOW}
GEMMA = {"query_pre_attn_scalar": HEAD, "attn_logit_softcapping": 1.5, "sliding_window": WINDOW}
GPT = {"sliding_window": WINDOW, "num_local_experts": 2, "num_experts_per_tok": 1, "attention_bias": False}
FULL, SLIDING = {"layer_types": ["full_attention"]}, {"layer_types": ["sliding_attention"]}
WINDOWED, SUNK = {"window": WINDOW}, {"learned_sinks": True}


@pytest.mark.parametrize(
    "family, theirs, name, options, soft_cap",
    [
        ("Llama", {}, "softmax", {}, 0.0),
        ("Mistral", MISTRAL, "local", WINDOWED, 0.0),
        ("Gemma2", GEMMA | FULL, "softmax", {}, 1.5),
        ("Gemma2", GEMMA | SLIDING, "local", WINDOWED, 1.5),
        ("GptOss", GPT | FULL, "softmax", SUNK, 0.0),
        ("GptOss", GPT | SLIDING, "local", SUNK | WINDOWED, 0.0),
    ],
)
def test_softmax_is_that_of(family, theirs, name, options, soft_cap):
    attention, oracle = layer_of(family, **SIZES, **theirs)

    def carry(read):
        sinks = {"sink": read(attention.sinks)} if options.get("learned_sinks") else {}
        return by_head(read, attention) | sinks

    agree(mixer_of(name, options, kv_heads=GROUPS, positions="rope", soft_cap=soft_cap), carry, oracle)


@pytest.mark.parametrize("family", ["DeepseekV2", "DeepseekV3"])
@pytest.mark.parametrize("query_rank", [0, 20])
def test_latent_is_deepseeks(family, query_rank):
    rank, rope_width = 12, 4
    sizes = {"kv_lora_rank": rank, "q_lora_rank": query_rank or None, "qk_rope_head_dim": rope_width}
    sizes |= {"qk_nope_head_dim": HEAD, "v_head_dim": HEAD, "num_key_value_heads": HEADS}
    attention, oracle = layer_of(family, first_k_dense_replace=1, **sizes)
    # Theirs rotates the pairs (2 i, 2 i + 1), ours (i, i + K / 2).
    halves = np.arange(rope_width).reshape(-1, 2).T.ravel()
    plain_first = np.concatenate([np.arange(HEAD), HEAD + halves])

    def carry(read):
        down = read(attention.kv_a_proj_with_mqa.weight).T
        up = turned(read(attention.kv_b_proj.weight), HEADS, 2 * HEAD)
        query = attention.q_b_proj if query_rank else attention.q_proj
        params = {
            "query": {"weight": turned(read(query.weight), HEADS, HEAD + rope_width)[..., plain_first]},
            "latent": {"weight": down[:, :rank]},
            "latent_norm": {"scale": read(attention.kv_a_layernorm.weight)},
            "key": {"weight": down[:, rank:][:, halves]},
            "key_up": up[..., :HEAD],
            "value_up": up[..., HEAD:],
            "out": {"weight": read(attention.o_proj.weight).T.reshape(HEADS, HEAD, WIDTH)},
        }
        if query_rank:
            params["query_down"] = {"weight": read(attention.q_a_proj.weight).T}
            params["query_norm"] = {"scale": read(attention.q_a_layernorm.weight)}
        return params

    options = {"kv_rank": rank, "rope_width": rope_width, "query_rank": query_rank}
    agree(mixer_of("latent", options, positions="rope"), carry, oracle)


@pytest.mark.parametrize("number", [0, 2])
def test_differential_is_diffllamas(number):
    attention, oracle = layer_of("DiffLlama", number, **SIZES)
    # Without a scale of its own, theirs is ours at one.
    attention.groupnorm = scattered(torch.nn.RMSNorm(2 * HEAD, eps=attention.groupnorm.eps))

    def carry(read):
        lambdas = {
            f"lambda_{end}": read(getattr(attention, f"lambda_{end}")) for end in ("q1", "k1", "q2", "k2")
        }
        scale = {"head_norm": {"scale": read(attention.groupnorm.weight)}}
        params = by_head(read, attention, order=neighbours) | lambdas | scale
        # Two heads make one of twice the width.
        out = params["out"]["weight"].reshape(HEADS // 2, 2 * HEAD, WIDTH)
        return params | {"out": {"weight": out}}

    agree(mixer_of("differential", {}, kv_heads=GROUPS, positions="rope", layer=number), carry, oracle)


@pytest.mark.parametrize("skip", [0, 5])
def test_nystrom_is_nystromformers(skip):
    from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

    landmarks = 10
    config = transformers.NystromformerConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_landmarks=landmarks,
        segment_means_seq_len=TIME,
        conv_kernel_size=skip or 1,
    )
    attention, out = scattered(NystromformerSelfAttention(config)), torch.nn.Linear(WIDTH, WIDTH, bias=False)
    # Each matrix's own norm, as in the paper; the other choice mixes rows and heads of a batch.
    attention.init_option = "exact"
    if not skip:
        attention.conv_kernel_size = None
    for linear in (attention.query, attention.key, attention.value):
        linear.bias.data.zero_()

    def carry(read):
        names = ("query", "key", "value")
        params = {
            name: {"weight": turned(read(getattr(attention, name).weight), HEADS, HEAD)} for name in names
        }
        params["out"] = {"weight": read(out.weight).T.reshape(HEADS, HEAD, WIDTH)}
        return params | ({"skip_weight": read(attention.conv.weight)[:, 0, :, 0].T} if skip else {})

    mixer = mixer_of("nystrom", {"landmarks": landmarks, "skip": skip}, bidirectional_mode=True)
    agree(mixer, carry, lambda x_BTD: out(attention(x_BTD)[0]))
