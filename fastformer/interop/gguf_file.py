"""GGUF, the one-file format of llama.cpp, for models of Llama's type: read with any of its quantisations,
written as F16, Q8_0 or Q4_0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from fastformer.core.errors import UserError
from fastformer.data.tokenisers import Tokeniser
from fastformer.interop import families
from fastformer.interop.families import LLAMA
from fastformer.interop.huggingface import from_library
from fastformer.interop.spelling import to_library

# What its names are in a Hugging Face directory.
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "model.layers.{}.input_layernorm",
    "ffn_norm": "model.layers.{}.post_attention_layernorm",
    "attn_q": "model.layers.{}.self_attn.q_proj",
    "attn_k": "model.layers.{}.self_attn.k_proj",
    "attn_v": "model.layers.{}.self_attn.v_proj",
    "attn_output": "model.layers.{}.self_attn.o_proj",
    "ffn_gate": "model.layers.{}.mlp.gate_proj",
    "ffn_up": "model.layers.{}.mlp.up_proj",
    "ffn_down": "model.layers.{}.mlp.down_proj",
}
# How llama.cpp's named pre-tokenisers cut text before byte pairs are merged.
PIECES = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}
KINDS = {"f16": "F16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
CONTROL = 3  # its number for special tokens


def rotated(x: np.ndarray, heads: int, back: bool = False) -> np.ndarray:
    """Return a matrix of queries or keys [out, in] with the rows of each head from pairs (2i, 2i + 1), as
    llama.cpp rotates them, to pairs (i, i + K/2), as we do; or ``back``.
    """
    half = x.shape[0] // heads // 2
    shape = (heads, 2, half, -1) if back else (heads, half, 2, -1)
    return x.reshape(shape).swapaxes(1, 2).reshape(x.shape)


class File:
    """An open file.

    Raises:
      UserError: it is no GGUF, or of another kind of model.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._reader = gguf.GGUFReader(path)
        except (OSError, ValueError, IndexError, KeyError) as error:
            raise UserError(f"--weights: {path} cannot be read as GGUF ({error})") from error
        kind = self.field("general.architecture")
        if kind != "llama":
            raise families.refused("general.architecture", kind, "llama")

    def field(self, name: str, default: Any = None) -> Any:
        """Return a setting."""
        found = self._reader.fields.get(name)
        return default if found is None else found.contents()

    def settings(self) -> tuple[dict[str, Any], int]:
        """Return config.model's settings, and the tokens it can hold."""
        names = {tensor.name for tensor in self._reader.tensors}
        if any(name.startswith("rope_freqs") for name in names) or self.field("llama.rope.scaling.type"):
            raise families.refused("rope scaling", "on", "none")
        heads = self.field("llama.attention.head_count")
        there = {
            "num_hidden_layers": self.field("llama.block_count"),
            "hidden_size": self.field("llama.embedding_length"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.field("llama.attention.head_count_kv", heads),
            "head_dim": self.field("llama.attention.key_length"),
            "intermediate_size": self.field("llama.feed_forward_length"),
            "rms_norm_eps": self.field("llama.attention.layer_norm_rms_epsilon", 1e-6),
            "rope_theta": self.field("llama.rope.freq_base", 10000.0),
            "tie_word_embeddings": "output.weight" not in names,
            "max_position_embeddings": self.field("llama.context_length", 2048),
        }
        if isinstance(there["rms_norm_eps"], float):
            # A float32 of the file says 1e-05 as 9.99999974738e-06.
            there["rms_norm_eps"] = float(str(np.float32(there["rms_norm_eps"])))
        return families.settled(LLAMA, there, str(self.path))

    def weights(self, heads: int, kv_heads: int) -> dict[str, np.ndarray]:
        """Return the weights by their names in a Hugging Face directory, float32."""
        found = {}
        for tensor in self._reader.tensors:
            x = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            parts = tensor.name.removesuffix(".weight").split(".")
            key = parts[-1]
            if key not in NAMES:
                raise UserError(f"--weights: {self.path} holds {tensor.name}, which a Llama does not have")
            if key in ("attn_q", "attn_k"):
                x = rotated(x, heads if key == "attn_q" else kv_heads)
            found[f"{NAMES[key].format(parts[1] if len(parts) > 1 else '')}.weight"] = x
        return found

    def tokeniser(self) -> Tokeniser:
        """Return its tokeniser.

        Raises:
          UserError: it is none of bytes, or cuts text in a way that is not known here.
        """
        kind, pieces = self.field("tokenizer.ggml.model"), self.field("tokenizer.ggml.pre", "gpt-2")
        if kind != "gpt2" or pieces not in PIECES:
            raise families.refused("tokeniser", f"{kind}, {pieces}", f"gpt2, {' or '.join(PIECES)}")
        tokens, end = self.field("tokenizer.ggml.tokens"), self.field("tokenizer.ggml.eos_token_id")
        if not tokens or end not in range(len(tokens)):
            raise UserError(f"--weights: {self.path} has no tokens, or none that ends a text")
        numbers = {token: i for i, token in enumerate(tokens)}
        merges = [tuple(merge.split(" ")) for merge in self.field("tokenizer.ggml.merges", [])]
        made = tokenizers.Tokenizer(models.BPE(numbers, [x for x in merges if "".join(x) in numbers]))
        made.pre_tokenizer, made.decoder = PIECES[pieces](), decoders.ByteLevel()
        types = self.field("tokenizer.ggml.token_type", [1] * len(tokens))
        made.add_special_tokens([token for token, type_ in zip(tokens, types) if type_ == CONTROL])
        return from_library(made.to_str(), tokens[end], len(tokens), str(self.path))


def write(path: Path, model: Any, params: Any, tokeniser: Tokeniser, kind: str) -> None:
    """Write a file that llama.cpp reads.

    Args:
      kind: a row of KINDS; rows that its blocks do not divide stay F16, vectors F32.

    Raises:
      UserError: the model is no Llama, or llama.cpp would cut text in another way.
    """
    config = model.config
    if families.family_of(config) is not LLAMA or families.window_of(config):
        raise UserError("--format: gguf is written of models of Llama's type without a window")
    pieces = pieces_of(tokeniser)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(model.length)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.hidden)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads or config.heads)
    writer.add_key_length(config.key_width)
    writer.add_value_length(config.key_width)
    writer.add_rope_dimension_count(config.key_width)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_layer_norm_rms_eps(config.norm_epsilon or 1e-6)
    writer.add_vocab_size(model.vocabulary)
    _add_tokeniser(writer, tokeniser, pieces)
    back = {theirs: ours for ours, theirs in NAMES.items()}
    for name, x in families.back(LLAMA, params, config.layers, config.tied).items():
        name, heads = name.removesuffix(".weight"), {"q_proj": config.heads, "k_proj": config.kv_heads}
        parts = name.split(".")
        if parts[-1] in heads:
            x = rotated(x, heads[parts[-1]] or config.heads, back=True)
        layer = parts[2] if parts[1:2] == ["layers"] else None
        short = back[name.replace(f".{layer}.", ".{}.", 1) if layer else name]
        _add(writer, f"blk.{layer}.{short}.weight" if layer else f"{short}.weight", x, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: gguf.GGUFWriter, name: str, x: np.ndarray, kind: str) -> None:
    if x.ndim == 1:
        return writer.add_tensor(name, x.astype(np.float32))
    which = gguf.GGMLQuantizationType[KINDS[kind]]
    if which == gguf.GGMLQuantizationType.F16 or x.shape[-1] % gguf.GGML_QUANT_SIZES[which][0]:
        return writer.add_tensor(name, x.astype(np.float16))
    return writer.add_tensor(name, gguf.quantize(x, which), raw_dtype=which)


def pieces_of(tokeniser: Tokeniser) -> str:
    """Return llama.cpp's name for how a tokeniser cuts text.

    Raises:
      UserError: it has none.
    """
    state = tokeniser.state()
    if state["name"] == "bytes":
        return "gpt-2"  # nothing is merged, so that any will do
    own = tokenizers.Tokenizer.from_str(state["model"]).pre_tokenizer
    for name, make in PIECES.items():
        if own is not None and own.__getstate__() == make().__getstate__():
            return name
    raise UserError(
        "--format: gguf: llama.cpp does not know how this run's tokeniser cuts text; bytes it does"
    )


def _add_tokeniser(writer: gguf.GGUFWriter, tokeniser: Tokeniser, pieces: str) -> None:
    import json

    text, _ = to_library(tokeniser)
    found, described = tokenizers.Tokenizer.from_str(text), json.loads(text)
    special = {number for number, token in found.get_added_tokens_decoder().items() if token.special}
    names = {number: token for token, number in found.get_vocab().items()}
    count = tokeniser.size
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pieces)
    writer.add_token_list([names.get(number, f"[PAD{number}]") for number in range(count)])
    unused = 5
    types = [CONTROL if i in special else 1 if i in names else unused for i in range(count)]
    writer.add_token_types(types)
    # It asks for merges; of bytes one that makes no token, and is not made.
    merges = described["model"]["merges"] or ["! !"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_eos_token_id(tokeniser.eod)
    writer.add_bos_token_id(tokeniser.eod)
    writer.add_add_bos_token(False)
