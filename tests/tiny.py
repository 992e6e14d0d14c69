"""The smallest run that has everything: a text of one's own, a model of a thousand weights, 12 steps."""

from __future__ import annotations

import random
from pathlib import Path

from ml_collections import ConfigDict

from configs import base
from fastformer.attention import VARIANTS
from fastformer.core import config as configuration

WORDS = "the model reads a row of tokens and says which comes next until every document has its end".split()


def write_texts(folder: Path) -> Path:
    """Write files of words in a random order, the same each time."""
    folder.mkdir(exist_ok=True)
    rng = random.Random(0)
    for number in range(40):
        path = folder / f"{number:02}.txt"
        if not path.exists():
            path.write_text(" ".join(rng.choices(WORDS, k=60)) + ".\n")
    return folder


def tiny_config(folder: Path) -> ConfigDict:
    """Return a configuration that trains in a second; texts and prepared data lie in ``folder``."""
    c = base.get_config()
    c.name = "tiny"
    c.data.source = f"files:{write_texts(folder / 'texts')}/*.txt"
    c.data.directory, c.data.length = str(folder / "prepared"), 16
    c.model.layers, c.model.width, c.model.heads, c.model.ff_width = 1, 16, 2, 16
    c.train.steps, c.train.batch = 12, 8
    c.optimiser.warmup_steps = 4
    c.evaluate.every, c.evaluate.rows = 6, 16
    c.checkpoint.every = 4
    c.log.every = 1
    c.generate.tokens = 8
    return c.lock()


def configured(folder: Path, **settings) -> ConfigDict:
    """Return the tiny configuration with ``optimiser__clip=0`` for ``optimiser.clip``, and so on."""
    config = tiny_config(folder)
    for key, value in settings.items():
        configuration.set_key(config, key.replace("__", "."), value)
    return config


def use_variant(config: ConfigDict, name: str) -> bool:
    """Give a configuration an attention variant in its smallest form; return whether it decodes.

    The model is an encoder where it does not.
    """
    variant = VARIANTS[name]
    decodes = variant.causal and variant.streaming
    with config.unlocked():
        config.model.attention = {"name": name, **variant.small}
        if not decodes:
            config.task.name, config.model.name, config.model.bidirectional = "mlm", "encoder", True
    return decodes
