"""What the models of Hugging Face are in ours: their settings and the names and axes of their weights."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from fastformer.core.errors import MALFORMED, UserError

# What the models below have in common; what a family does not say is so.
PLAIN = {
    "name": "decoder", "qk_norm": False, "soft_cap": 0.0, "short_conv": -1, "output_gate": False,
    "pattern": (), "bidirectional": False, "encoder_layers": 0, "encoder_pattern": (), "head_width": 0,
    "scan": False, "bias": False, "attention": {"name": "softmax"}, "norm_placement": "pre",
    "embedding_norm": False, "token_types": 0, "prefix_lm": False,
}  # fmt: skip


JOINED, PARTS = ".attn.c_attn.", ("query", "key", "value")  # GPT-2's one matrix of three


class Row(NamedTuple):
    """One weight.

    Attributes:
      ours: its path, with {} for the layer. theirs: its name there.
      inputs: how many of our axes are summed over; 0 where the arrays are the same.
    """

    ours: str
    theirs: str
    inputs: int = 0


class Family(NamedTuple):
    """A kind of model.

    Attributes:
      name: ``model_type`` there. top, layer: the weights.
      settings: theirs -> config.model's and the tokens that positions reach, or raises. back: the reverse.
      turned: theirs are [out, in], as torch's linear layers have them; ours [in, out].
      tidy: the weights of a directory -> the same by the names above.
      ignored: regular expression over the names of what may be left over: heads, buffers, what is known.
    """

    name: str
    top: tuple[Row, ...]
    layer: tuple[Row, ...]
    settings: Callable[[Mapping[str, Any]], tuple[dict[str, Any], int]]
    back: Callable[[Any, int, int], dict[str, Any]]
    turned: bool
    tidy: Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]] = dict
    ignored: str = r"lm_head\.weight|.*rotary_emb\..*"

    def rows(self, layers: int, tied: bool) -> list[Row]:
        """Return every weight of a model with so many layers."""
        found = [row for row in self.top if not (tied and row.ours == "head/weight")]
        for layer in range(layers):
            found += [Row(row.ours.format(layer), row.theirs.format(layer), row.inputs) for row in self.layer]
        return found


def ours(family: Family, theirs: Mapping[str, np.ndarray], shapes: Any, layers: int, tied: bool) -> Any:
    """Return our parameters; ``shapes`` are those of our model.

    Raises:
      UserError: a weight is not there, of another shape, not finite, or one that our model has no place for.
    """
    wanted, found, rows = flatten_dict(shapes, sep="/"), {}, family.rows(layers, tied)
    placed = {row.theirs for row in rows}
    left = [name for name in theirs if name not in placed and not re.fullmatch(family.ignored, name)]
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise UserError(f"--weights: there is {left[0]}{more}, for which its settings have no place")
    for row in rows:
        if row.theirs not in theirs:
            raise UserError(f"--weights: {row.theirs} is not there, which a model of type {family.name} has")
        x, shape = theirs[row.theirs], wanted[row.ours].shape
        flat = (math.prod(shape[: row.inputs]), math.prod(shape[row.inputs :]))
        # Vectors have no heads there; matrices have two axes.
        asked = flat if row.inputs else (math.prod(shape),) if row.ours.endswith("/bias") else shape
        asked = asked[::-1] if row.inputs and family.turned else asked
        if x.shape != asked:
            raise UserError(f"--weights: {row.theirs} is {x.shape}, and its settings ask for {asked}")
        if not np.isfinite(x).all():
            raise UserError(f"--weights: {row.theirs} has entries that are not finite")
        x = x.T if row.inputs and family.turned else x
        found[row.ours] = np.ascontiguousarray(x.reshape(shape), np.float32)
    return unflatten_dict(found, sep="/")


def settled(family: Family, theirs: Mapping[str, Any], where: str) -> tuple[dict[str, Any], int]:
    """Return config.model's settings and the tokens that positions reach.

    Raises:
      UserError: one is missing, of another kind, or not of our models.
    """
    try:
        found, longest = family.settings(theirs)
        if type(longest) is not int:
            raise TypeError(f"positions reach {longest!r} tokens")
        return found, longest
    except KeyError as error:
        raise UserError(f"--weights: {where} has no {error.args[0]}") from error
    except MALFORMED as error:
        raise UserError(f"--weights: {where} holds no settings of a {family.name} ({error})") from error


def back(family: Family, params: Any, layers: int, tied: bool) -> dict[str, np.ndarray]:
    """Return the weights by their names there, from our parameters."""
    flat, found = flatten_dict(params, sep="/"), {}
    for row in family.rows(layers, tied):
        x = np.asarray(flat[row.ours], np.float32)
        if row.inputs:
            x = x.reshape(int(np.prod(x.shape[: row.inputs])), -1)
            x = x.T if family.turned else x
        found[row.theirs] = np.ascontiguousarray(x.ravel() if row.ours.endswith("/bias") else x)
    return found


def refused(name: str, value: Any, allowed: str) -> UserError:
    """Return the error of a setting that our models do not have."""
    return UserError(f"--weights: its {name} is {value!r}, which fastformer does not read; only {allowed}")


def llama_settings(c: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """Return ours for Llama (2302.13971), SmolLM, and Mistral without or with its window."""
    if c.get("hidden_act", "silu") != "silu":
        raise refused("hidden_act", c["hidden_act"], "silu")
    for name in ("attention_bias", "mlp_bias"):
        if c.get(name):
            raise refused(name, c[name], "false")
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise refused("rope_scaling", kind, "default")
    heads = c["num_attention_heads"]
    window = c.get("sliding_window") if c.get("model_type") == "mistral" else None
    return PLAIN | {
        "layers": c["num_hidden_layers"],
        "width": c["hidden_size"],
        "heads": heads,
        "kv_heads": c.get("num_key_value_heads") or heads,
        "head_width": c.get("head_dim") or c["hidden_size"] // heads,
        "ff_width": c["intermediate_size"],
        "norm": "rms",
        "norm_epsilon": float(c.get("rms_norm_eps", 1e-6)),
        "mlp": "swiglu",
        "positions": "rope",
        "rope_base": float(rope.get("rope_theta", c.get("rope_theta", 10000.0))),
        "tied": bool(c.get("tie_word_embeddings", False)),
        "attention": {"name": "local", "window": window} if window else {"name": "softmax"},
    }, c.get("max_position_embeddings", 2048)


def llama_back(model: Any, vocabulary: int, length: int) -> dict[str, Any]:
    """Return Llama's settings, or Mistral's where attention has a window."""
    window = window_of(model)
    kind = ("mistral", "MistralForCausalLM") if window else ("llama", "LlamaForCausalLM")
    return {
        "model_type": kind[0], "architectures": [kind[1]], "hidden_act": "silu", "attention_bias": False,
        "num_hidden_layers": model.layers, "hidden_size": model.width, "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads or model.heads, "head_dim": model.key_width, "mlp_bias": False,
        "intermediate_size": model.hidden, "rms_norm_eps": model.norm_epsilon or 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base},
        "tie_word_embeddings": model.tied, "vocab_size": vocabulary, "max_position_embeddings": length,
        "torch_dtype": "float32", **({"sliding_window": window} if window else {}),
    }  # fmt: skip


def window_of(model: Any) -> int | None:
    """Return the tokens that the attention of a model of one variant sees, None for all."""
    return getattr(model.mixer(0, detached=True), "window", None)


def gpt2_settings(c: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """Return ours for GPT-2 (Radford et al. 2019)."""
    if c.get("activation_function", "gelu_new") != "gelu_new":
        raise refused("activation_function", c["activation_function"], "gelu_new")
    for name, usual in (("scale_attn_by_inverse_layer_idx", False), ("scale_attn_weights", True)):
        if bool(c.get(name, usual)) is not usual:
            raise refused(name, c[name], str(usual).lower())
    return PLAIN | {
        "layers": c["n_layer"],
        "width": c["n_embd"],
        "heads": c["n_head"],
        "kv_heads": 0,
        "ff_width": c.get("n_inner") or 4 * c["n_embd"],
        "norm": "layer",
        "norm_epsilon": float(c.get("layer_norm_epsilon", 1e-5)),
        "mlp": "gelu",
        "positions": "learned",
        "bias": True,
        "tied": bool(c.get("tie_word_embeddings", True)),
    }, c["n_positions"]


def gpt2_back(model: Any, vocabulary: int, length: int) -> dict[str, Any]:
    """Return GPT-2's settings."""
    return {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new",
        "n_layer": model.layers, "n_embd": model.width, "n_head": model.heads, "n_inner": model.hidden,
        "layer_norm_epsilon": model.norm_epsilon or 1e-5, "n_positions": length, "vocab_size": vocabulary,
        "tie_word_embeddings": model.tied, "torch_dtype": "float32",
    }  # fmt: skip


def split(theirs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the weights with GPT-2's joined matrices cut into their three."""
    found = {}
    for name, x in theirs.items():
        name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        if JOINED not in name:
            found[name] = x
            continue
        for part, third in zip(PARTS, np.split(x, 3, axis=-1)):
            found[name.replace(JOINED, f"{JOINED}{part}.")] = third
    return found


def join(theirs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the weights with GPT-2's three matrices as one again."""
    found = {}
    for name, x in theirs.items():
        if JOINED not in name:
            found[name] = x
        elif f"{JOINED}{PARTS[0]}." in name:
            three = [theirs[name.replace(PARTS[0], part)] for part in PARTS]
            found[name.replace(f"{PARTS[0]}.", "")] = np.concatenate(three, axis=-1)
    return found


def branches(names: Mapping[str, tuple[str, int]], bias: bool) -> tuple[Row, ...]:
    """Return the rows of linear maps of a layer: ours to theirs and the axes that are summed over."""
    found = []
    for ours_name, (name, inputs) in names.items():
        found.append(Row(f"layer_{{}}/{ours_name}/weight", f"{name}.weight", inputs))
        if bias:
            found.append(Row(f"layer_{{}}/{ours_name}/bias", f"{name}.bias"))
    return tuple(found)


LLAMA = Family(
    "llama",
    (
        Row("embedding", "model.embed_tokens.weight"),
        Row("norm/scale", "model.norm.weight"),
        Row("head/weight", "lm_head.weight", 1),
    ),
    (
        Row("layer_{}/mixer_norm/scale", "model.layers.{}.input_layernorm.weight"),
        Row("layer_{}/mlp_norm/scale", "model.layers.{}.post_attention_layernorm.weight"),
        *branches(
            {
                "mixer/query": ("model.layers.{}.self_attn.q_proj", 1),
                "mixer/key": ("model.layers.{}.self_attn.k_proj", 1),
                "mixer/value": ("model.layers.{}.self_attn.v_proj", 1),
                "mixer/out": ("model.layers.{}.self_attn.o_proj", 2),
                "mlp/gate": ("model.layers.{}.mlp.gate_proj", 1),
                "mlp/up": ("model.layers.{}.mlp.up_proj", 1),
                "mlp/down": ("model.layers.{}.mlp.down_proj", 1),
            },
            False,
        ),
    ),
    llama_settings,
    llama_back,
    turned=True,
)

# Its queries, keys and values are one matrix, which ``split`` cuts and ``join`` puts together.
GPT2 = Family(
    "gpt2",
    (
        Row("embedding", "transformer.wte.weight"),
        Row("positions", "transformer.wpe.weight"),
        Row("norm/scale", "transformer.ln_f.weight"),
        Row("norm/bias", "transformer.ln_f.bias"),
        Row("head/weight", "lm_head.weight", 1),
    ),
    (
        Row("layer_{}/mixer_norm/scale", "transformer.h.{}.ln_1.weight"),
        Row("layer_{}/mixer_norm/bias", "transformer.h.{}.ln_1.bias"),
        Row("layer_{}/mlp_norm/scale", "transformer.h.{}.ln_2.weight"),
        Row("layer_{}/mlp_norm/bias", "transformer.h.{}.ln_2.bias"),
        *branches(
            {
                "mixer/query": ("transformer.h.{}.attn.c_attn.query", 1),
                "mixer/key": ("transformer.h.{}.attn.c_attn.key", 1),
                "mixer/value": ("transformer.h.{}.attn.c_attn.value", 1),
                "mixer/out": ("transformer.h.{}.attn.c_proj", 2),
                "mlp/up": ("transformer.h.{}.mlp.c_fc", 1),
                "mlp/down": ("transformer.h.{}.mlp.c_proj", 1),
            },
            True,
        ),
    ),
    gpt2_settings,
    gpt2_back,
    turned=False,
    tidy=split,
    ignored=r"lm_head\.weight|.*\.attn\.(masked_)?bias",  # masks
)

HELD = ("softmax", "local")  # attention that they have


def family_of(model: Any) -> Family:
    """Return the family that a decoder's configuration is of.

    Raises:
      UserError: there is none; the line says what of it they do not have.
    """
    odd = [name for name in model.variants if name not in HELD]
    if odd or len(set(model.variants)) > 1:
        raise UserError(f"--format: no format holds {', '.join(odd) or 'a pattern of several variants'}")
    lacks = {
        "qk_norm": model.qk_norm, "soft_cap": bool(model.soft_cap), "short_conv": model.short_conv > 0,
        "output_gate": model.output_gate, "norm_placement": model.norm_placement != "pre",
        "embedding_norm": model.embedding_norm, "prefix_lm": model.prefix_lm,
    }  # fmt: skip
    for name, has in lacks.items():
        if has:
            raise UserError(
                f"--format: config.model.{name}: the formats of Llama and GPT-2 have no such; stablehlo does"
            )
    options = [k for k, v in model.attention.items() if k not in ("name", "window") and v]
    if options:
        raise UserError(f"--format: config.model.attention.{options[0]}: the formats have none")
    kinds = {
        ("rms", "swiglu", "rope", False): LLAMA,
        ("layer", "gelu", "learned", True): GPT2,
    }
    kind = (model.norm, model.mlp, model.positions, model.bias)
    if kind not in kinds or (
        kinds[kind] is GPT2 and (window_of(model) or model.kv_heads not in (0, model.heads))
    ):
        raise UserError(
            f"--format: norm {model.norm}, mlp {model.mlp}, positions {model.positions}, bias {model.bias}: "
            "a Llama has rms, swiglu, rope and none; a GPT-2 layer, gelu, learned, biases and no window"
        )
    return kinds[kind]
