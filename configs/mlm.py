"""An encoder of the running Python's documentation, trained to tell hidden tokens (1810.04805).

Command: python launch.py --config=configs/mlm.py (20 minutes on one CPU core beside other work)
Expect: an accuracy of 0.26, where the commonest token has 0.03.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.name = "mlm"
    c.task = ConfigDict({"name": "mlm", "chosen": 0.15})
    c.data.source = "python_docs"
    c.data.tokeniser = "bpe"
    c.model.name = "encoder"
    c.model.bidirectional = True
    c.model.layers = 4
    c.model.width = 192
    c.model.heads = 4
    c.train.steps = 1000
    c.train.batch = 8
    c.optimiser.name = "muon"
    c.optimiser.learning_rate = 1e-2
    c.evaluate.every = 250
    c.evaluate.rows = 64
    return c
