"""ListOps by Long Range Arena's rules, trees of 500 to 2000 tokens, closing brackets kept.

Command: python launch.py --config=configs/listops.py (hours on two CPU cores, not run); a short form is
  python launch.py --config=configs/listops.py:short (trees of 10 to 100 tokens; 35 minutes: accuracy 0.565)
Expect: the full form above 36 % (Tay et al. 2020, 2011.04006, table 1, for softmax without brackets)
  against 17 % for the commonest digit; keeping the brackets makes ours the easier task, so that the two
  do not compare.
"""

from ml_collections import ConfigDict

from configs import base

ARMS = {"full": "trees as published", "short": "trees of 10 to 100 tokens"}


def get_config(arm: str = "full") -> ConfigDict:
    c = base.get_config()
    c.name = "listops"
    c.task = ConfigDict()
    c.task.name = "listops"
    c.task.shortest = 500
    c.task.longest = 2000
    c.task.heldout_rows = 2_000
    c.data.source = "synthetic"
    c.data.length = 2048
    c.model.name = "encoder"
    c.model.bidirectional = True
    c.model.layers = 4
    c.model.width = 128
    c.model.heads = 4
    c.train.steps = 5000
    c.train.batch = 32
    c.optimiser.learning_rate = 1e-3
    c.evaluate.every = 500
    c.evaluate.rows = 512
    if arm == "short":
        c.name = "listops-short"
        c.task.shortest = 10
        c.task.longest = 100
        c.data.length = 128
        c.train.steps = 3000
    return c
