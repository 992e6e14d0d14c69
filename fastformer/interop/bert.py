"""BERT, the encoder: its settings and the names and axes of its weights, as Hugging Face has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastformer.core.errors import UserError
from fastformer.interop.families import PLAIN, Family, Row, branches, refused


def bert_settings(c: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """Return ours for BERT (Devlin et al. 2018, 1810.04805) without its heads."""
    activations = {"gelu": "gelu_erf", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu"}
    if c.get("hidden_act", "gelu") not in activations:
        raise refused("hidden_act", c["hidden_act"], " or ".join(activations))
    if c.get("position_embedding_type", "absolute") != "absolute":
        raise refused("position_embedding_type", c["position_embedding_type"], "absolute")
    for name in ("is_decoder", "add_cross_attention"):
        if c.get(name):
            raise refused(name, c[name], "false")
    return PLAIN | {
        "name": "encoder",
        "bidirectional": True,
        "layers": c["num_hidden_layers"],
        "width": c["hidden_size"],
        "heads": c["num_attention_heads"],
        "kv_heads": 0,
        "ff_width": c["intermediate_size"],
        "norm": "layer",
        "norm_epsilon": float(c.get("layer_norm_eps", 1e-12)),
        "norm_placement": "post",
        "embedding_norm": True,
        "token_types": c.get("type_vocab_size", 2),
        "mlp": activations[c.get("hidden_act", "gelu")],
        "positions": "learned",
        "bias": True,
        "tied": True,
        "loss_chunk": 0,
    }, c.get("max_position_embeddings", 512)


def bert_back(model: Any, vocabulary: int, length: int) -> dict[str, Any]:
    """Return BERT's settings."""
    return {
        "model_type": "bert", "architectures": ["BertModel"], "num_hidden_layers": model.layers,
        "hidden_act": {"gelu_erf": "gelu", "gelu": "gelu_new"}[model.mlp], "hidden_size": model.width,
        "num_attention_heads": model.heads, "intermediate_size": model.hidden, "vocab_size": vocabulary,
        "layer_norm_eps": model.norm_epsilon or 1e-5, "max_position_embeddings": length,
        "type_vocab_size": model.token_types, "torch_dtype": "float32", "pad_token_id": 0,
    }  # fmt: skip


def bare_names(theirs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return BERT's weights without what stands before their names under a head, and with today's names."""
    today = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    found = {}
    for name, x in theirs.items():
        for old, new in today.items():
            name = name.replace(old, new)
        found[name.removeprefix("bert.")] = x
    return found


BERT = Family(
    "bert",
    (
        Row("embedding", "embeddings.word_embeddings.weight"),
        Row("positions", "embeddings.position_embeddings.weight"),
        Row("types", "embeddings.token_type_embeddings.weight"),
        Row("embedding_norm/scale", "embeddings.LayerNorm.weight"),
        Row("embedding_norm/bias", "embeddings.LayerNorm.bias"),
    ),
    (
        Row("layer_{}/mixer_norm/scale", "encoder.layer.{}.attention.output.LayerNorm.weight"),
        Row("layer_{}/mixer_norm/bias", "encoder.layer.{}.attention.output.LayerNorm.bias"),
        Row("layer_{}/mlp_norm/scale", "encoder.layer.{}.output.LayerNorm.weight"),
        Row("layer_{}/mlp_norm/bias", "encoder.layer.{}.output.LayerNorm.bias"),
        *branches(
            {
                "mixer/query": ("encoder.layer.{}.attention.self.query", 1),
                "mixer/key": ("encoder.layer.{}.attention.self.key", 1),
                "mixer/value": ("encoder.layer.{}.attention.self.value", 1),
                "mixer/out": ("encoder.layer.{}.attention.output.dense", 2),
                "mlp/up": ("encoder.layer.{}.intermediate.dense", 1),
                "mlp/down": ("encoder.layer.{}.output.dense", 1),
            },
            True,
        ),
    ),
    bert_settings,
    bert_back,
    turned=True,
    tidy=bare_names,
    ignored=r"(pooler|cls|classifier|qa_outputs)\..*|.*\.position_ids",  # heads
)


def family_of(model: Any) -> Family:
    """Return BERT where an encoder's configuration is of its kind.

    Raises:
      UserError: it is not; the line says what it has that a BERT does not.
    """
    wanted = {
        "bidirectional": True, "norm": "layer", "norm_placement": "post", "embedding_norm": True,
        "positions": "learned", "bias": True, "qk_norm": False, "soft_cap": 0.0, "output_gate": False,
        "variants": ("softmax",),
    }  # fmt: skip
    for name, value in wanted.items():
        if getattr(model, name) != value:
            raise UserError(f"--format: config.model.{name}: {getattr(model, name)}, and a BERT has {value}")
    if model.mlp == "swiglu" or model.kv_heads not in (0, model.heads) or not model.token_types:
        raise UserError("--format: a BERT has gelu or gelu_erf, as many kv_heads as heads, and token_types")
    if model.attention.get("learned_sinks"):
        raise UserError("--format: config.model.attention.learned_sinks: a BERT has none")
    return BERT
