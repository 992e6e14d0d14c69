"""A language model of Python code, from nothing to samples, on a laptop CPU."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.name = "quickstart"
    c.data.tokeniser = "bpe"
    c.data.vocabulary = 2048
    c.data.length = 256
    c.model.layers = 4
    c.model.width = 192
    c.model.heads = 2
    c.train.steps = 300
    c.train.batch = 8
    c.optimiser.learning_rate = 6e-3
    c.optimiser.warmup_steps = 30
    c.optimiser.final_fraction = 0.02
    c.evaluate.every = 0
    c.evaluate.overlap = 0
    c.evaluate.batch = 16
    c.checkpoint.every = 250
    c.generate.tokens = 200
    c.generate.temperature = 0.7
    c.generate.top_p = 0.95
    c.generate.prompt = "def "
    return c
