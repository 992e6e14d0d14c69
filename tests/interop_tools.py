"""What the tests of imports and exports share: tiny models and a tokeniser."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from compress_tools import configured
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as token_models

from fastformer import interop, models
from fastformer.core.seq import whole
from fastformer.data.tokenisers import BPETokeniser, ByteTokeniser

WHY = "pip install torch==2.13.0 transformers"
TEXT = "def add(a, b):\n    return a + b  # naïve, 1234\n"
SIZES = {"model__layers": 2, "model__width": 32, "model__heads": 4, "model__ff_width": 64}
GPT2 = {
    "model__norm": "layer", "model__mlp": "gelu", "model__positions": "learned", "model__bias": True,
    "model__norm_epsilon": 1e-5,
}  # fmt: skip
KINDS = {
    "llama": {"model__kv_heads": 2, "model__rope_base": 1e5, "model__norm_epsilon": 1e-5},
    "untied": {"model__tied": False, "model__head_width": 16},
    "mistral": {"model__attention__name": "local", "model__attention__window": 8},
    "gpt2": GPT2,
}


def drawn(model):
    """Return parameters, every one away from its initial value."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32), whole(1, 2)))
    leaves, tree = jax.tree.flatten(shapes["params"])
    rng = np.random.default_rng(0)
    new = [(0.2 * rng.standard_normal(x.shape)).astype(np.float32) + (x.ndim == 1) for x in leaves]
    return nn.unbox(jax.tree.unflatten(tree, new))


def logits(model, params, tokens):
    return np.asarray(model.apply({"params": params}, jnp.asarray(tokens), whole(*np.shape(tokens)))[0])


def bpe():
    made = Tokenizer(token_models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([TEXT * 50], trainer)
    return BPETokeniser(made.to_str(), 0, 304)  # three tokens more than it needs, as models have


def made(folder, kind, tokeniser=None):
    tokeniser = tokeniser or ByteTokeniser()
    config = configured(folder, **SIZES | KINDS[kind])
    model = models.build(config, tokeniser.size, 64)
    return config, model, drawn(model), tokeniser


def written(folder, form, kind, tokeniser=None):
    config, model, params, tokeniser = made(folder, kind, tokeniser)
    interop.write(form, str(folder / "out"), model, lambda: params, tokeniser)
    return config, model, params, tokeniser
