"""What the tests of compression share."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict
from tiny import tiny_config

from fastformer import compress, models, tasks
from fastformer.core import config as configuration
from fastformer.core.seq import whole
from fastformer.train import loop

VOCABULARY, LENGTH = 257, 16
DEVICES = jax.devices()[:1]


def configured(folder: Path, *methods: str, **settings) -> ConfigDict:
    """Return the tiny configuration with these methods, and ``quantise__group=8`` for its key in compress."""
    config = tiny_config(folder)
    configuration.set_key(config, "compress.methods", methods)
    for key, value in settings.items():
        key = key.replace("__", ".")
        section = key.split(".")[0]
        configuration.set_key(config, f"compress.{key}" if section in compress.METHODS else key, value)
    return config


def made(config: ConfigDict):
    """Return ``(compression, compressed model, float model, its weights)``; no data is opened."""
    compression = compress.build(config)
    model = models.build(config, VOCABULARY, LENGTH)
    return compression, compression.model(model), model, initial(model)


def initial(model, seed: int = 0):
    """Return initial weights of a model."""
    key = jax.random.key(seed)
    return nn.unbox(model.init(key, jnp.zeros((2, LENGTH), jnp.int32), whole(2, LENGTH))["params"])


def batch(rows: int = 4, seed: int = 0):
    """Return a batch of random tokens, and what the text task needs besides."""
    tokens = np.random.default_rng(seed).integers(0, VOCABULARY, (rows, LENGTH + 1)).astype(np.int32)
    seq = whole(rows, LENGTH)
    return {
        "tokens_BT": jnp.asarray(tokens[:, :-1]), "targets_BT": jnp.asarray(tokens[:, 1:]),
        "weights_BT": jnp.ones((rows, LENGTH), jnp.float32),
        "segment_BT": seq.segment_BT, "position_BT": seq.position_BT,
    }  # fmt: skip


def logits(model, params, rows: int = 4):
    """Return logits of a batch."""
    x = batch(rows)
    return model.apply({"params": params}, x["tokens_BT"], whole(rows, LENGTH))[0]


def task_loss(model, params, rng=None):
    """Return the mean nats of a batch."""
    nats, targets = tasks.Text().loss(model, params, batch(), rng)
    return nats / targets


def plain_place(x, letters):
    """Put an array on one device."""
    assert len(letters) == x.ndim
    return jnp.asarray(x)


def train(config: ConfigDict, workdir: Path) -> Path:
    """Train a run and return its workdir."""
    loop.train(config, workdir, DEVICES)
    return workdir
