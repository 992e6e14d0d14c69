"""Handwritten digits told apart from their pixels, one after another, as long-range image classification is.

Command: python launch.py --config=configs/digits.py (3 minutes on one CPU core)
Expect: 90 %, where the commonest digit has 10 %; the pixels' place is all that says what is beside what.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.name = "digits"
    c.task = ConfigDict({"name": "digits"})
    c.data.source = "digits"
    c.data.length = 64
    c.model.name = "encoder"
    c.model.bidirectional = True
    c.model.positions = "learned"
    c.model.layers = 2
    c.model.width = 64
    c.model.heads = 4
    c.model.dropout = 0.1
    c.train.steps = 1500
    c.train.batch = 32
    c.optimiser.learning_rate = 3e-3
    c.evaluate.every = 250
    return c
