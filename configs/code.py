"""A language model of Python code, of the quickstart's kind but larger and longer trained.

Command: python launch.py --config=configs/code.py (hours on two CPU cores; not run)
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config() -> ConfigDict:
    c = quickstart.get_config()
    c.name = "code"
    c.task = ConfigDict({"name": "code", "functions": 64, "infill": 0.5})
    c.data.vocabulary = 8192
    c.data.length = 512
    c.model.layers = 8
    c.model.width = 384
    c.model.heads = 6
    c.train.steps = 10000
    c.train.batch = 32
    c.optimiser.learning_rate = 2e-3
    c.optimiser.warmup_steps = 500
    c.evaluate.every = 1000
    c.evaluate.rows = 256
    c.checkpoint.every = 500
    return c
