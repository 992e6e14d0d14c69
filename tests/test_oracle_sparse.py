"""Sparse attention against transformers' layers: weights carried over, outputs and input gradients equal."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastformer.attention import make
from fastformer.attention.bigbird import draw
from fastformer.core.seq import Seq, whole

pytestmark = pytest.mark.oracle
WHY = "pip install torch==2.13.0 transformers"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)

BATCH, WIDTH, HEADS = 2, 32, 4
SHARED = {"heads": HEADS, "head_width": WIDTH // HEADS, "bidirectional_mode": True}


def projection(linear, heads):
    """Return torch's ``[out, in]`` as the weight ``[in, heads, width]``; its bias must be zero."""
    weight = linear.weight.detach().numpy()
    return {"weight": weight.T.reshape(weight.shape[1], heads, -1)}


def output(weight, heads):
    return {"weight": weight.T.reshape(heads, -1, weight.shape[0])}


def agree(mixer, params, seq, oracle, tolerance=1e-4):
    """Check real outputs and input gradients of a mixer and of a torch function of x_BTD."""
    batch, time = seq.segment_BT.shape
    x = np.random.default_rng(0).standard_normal((batch, time, WIDTH)).astype(np.float32)
    real = np.asarray(seq.segment_BT > 0)[..., None]
    weights = (np.cos(np.arange(x.size)).reshape(x.shape) * real).astype(np.float32)
    there = torch.tensor(x, requires_grad=True)
    want = oracle(there)
    (want * torch.tensor(weights)).sum().backward()

    @jax.jit
    def here(x):
        y, pull = jax.vjp(lambda x: mixer.apply({"params": params}, x, seq)[0], x)
        return y, pull(jnp.asarray(weights))[0]

    y, dx = here(jnp.asarray(x))
    for got, expected in ((y, want.detach().numpy()), (dx, there.grad.numpy())):
        bound = tolerance * np.abs(expected).max()
        np.testing.assert_allclose(got * real, expected * real, atol=bound, rtol=0)


@pytest.mark.parametrize("tokens", [1, 3])
def test_longformer(tokens):
    """Windows, global keys, and global queries with projections of their own; one row padded."""
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    config = transformers.LongformerConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        attention_window=[8],
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    layer = LongformerSelfAttention(config, 0).eval()
    for name, parameter in layer.named_parameters():
        parameter.data = torch.randn(parameter.shape) / 6 * ("weight" in name)
    length = np.array([40, 29])
    segment = (np.arange(40)[None] < length[:, None]).astype(np.int32)
    seq = Seq(jnp.asarray(segment), jnp.broadcast_to(jnp.arange(40, dtype=jnp.int32), (BATCH, 40)))
    everywhere = torch.tensor((np.arange(40) < tokens)[None].repeat(BATCH, axis=0))
    padding = torch.tensor(segment == 0)
    mask = torch.where(padding, -10000.0, torch.where(everywhere, 10000.0, 0.0))

    def oracle(x):
        return layer(
            x,
            attention_mask=mask,
            is_index_masked=padding,
            is_index_global_attn=everywhere,
            is_global_attn=True,
        )[0]

    params = {name: projection(getattr(layer, name), HEADS) for name in ("query", "key", "value")}
    params |= {f"global_{name}": projection(getattr(layer, f"{name}_global"), HEADS) for name in params}
    params["out"] = output(np.eye(WIDTH, dtype=np.float32), HEADS)
    agree(make("longformer", {"window": 5, "global_tokens": tokens}, SHARED), params, seq, oracle)


def test_local_is_mistral():
    """The sliding window under rotary positions and grouped heads."""
    config = transformers.MistralConfig(
        vocab_size=7,
        hidden_size=WIDTH,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        sliding_window=6,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = transformers.MistralModel(config).eval()
    layer = model.layers[0].self_attn
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape) / 6
    model.layers[0].input_layernorm = torch.nn.Identity()

    def oracle(x):
        outputs = []
        hook = layer.register_forward_hook(lambda module, args, out: outputs.append(out[0]))
        model(inputs_embeds=x)
        hook.remove()
        return outputs[0]

    params = {
        "query": projection(layer.q_proj, HEADS),
        "key": projection(layer.k_proj, 2),
        "value": projection(layer.v_proj, 2),
        "out": output(layer.o_proj.weight.detach().numpy(), HEADS),
    }
    shared = {"heads": HEADS, "kv_heads": 2, "head_width": WIDTH // HEADS, "positions": "rope"}
    agree(make("local", {"window": 6}, shared), params, whole(1, 37), oracle)


def bigbird_layer(kind):
    """Return a random layer of transformers' and its parameters as ours."""
    from transformers.models.big_bird import modeling_big_bird

    config = transformers.BigBirdConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        block_size=4,
        num_random_blocks=2,
        use_bias=False,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    layer = getattr(modeling_big_bird, kind)(config).eval()
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape) / 6
    params = {name: projection(getattr(layer, name), HEADS) for name in ("query", "key", "value")}
    return layer, params | {"out": output(np.eye(WIDTH, dtype=np.float32), HEADS)}


def test_bigbird_block_sparse():
    """Both read the same random blocks: ours, given to theirs."""
    from transformers import BigBirdModel

    layer, params = bigbird_layer("BigBirdBlockSparseAttention")
    blocks, size, random = 10, 4, 2
    number = jnp.arange(1, blocks - 1)
    drawn = draw(0, HEADS, number, jnp.full_like(number, blocks - 1), random)
    table = np.asarray(drawn).swapaxes(0, 1).astype(np.int64)
    layer._bigbird_block_rand_mask_with_head = lambda **sizes: list(table)
    blocked, band, rows, columns = BigBirdModel.create_masks_for_block_sparse_attn(
        torch.ones(BATCH, blocks * size), size
    )

    def oracle(x):
        return layer(x, band, rows, columns, blocked, blocked)[0]

    mixer = make("bigbird", {"block_size": size, "random_blocks": random}, SHARED)
    agree(mixer, params, whole(BATCH, blocks * size), oracle)


def test_bigbird_original_full():
    """Which is plain attention."""
    layer, params = bigbird_layer("BigBirdSelfAttention")
    agree(make("softmax", {}, SHARED), params, whole(BATCH, 40), lambda x: layer(x)[0])
