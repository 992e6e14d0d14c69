"""Multi-query associative recall by Zoology's rule: can the mixer look up what a key was bound to?

The set-up is that of figure 2 of Arora et al. 2024 (2402.18668): a short convolution and no positions.
Command: python launch.py --config=configs/recall.py (5 minutes on one CPU core)
Expect: softmax above 99 % (Arora et al. 2023, 2312.04927, figure 2: width 64 at T = 128 with 8 pairs);
  mixers of constant state below it where pairs outgrow the state.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.name = "recall"
    c.task = ConfigDict()
    c.task.name = "recall"
    c.task.pairs = 8
    c.task.vocabulary = 8192
    c.task.train_rows = 100_000
    c.task.heldout_rows = 3_000
    c.data.source = "synthetic"
    c.data.length = 128
    c.model.layers = 2
    c.model.width = 64
    c.model.heads = 1
    c.model.positions = "none"
    c.model.short_conv = 4  # puts a key beside its value, as in 2402.18668; without it 3,000 steps do not do
    c.train.steps = 600
    c.train.batch = 64
    c.optimiser.learning_rate = 8e-3  # at 2e-3 it takes several times as many steps
    c.optimiser.warmup_steps = 100
    c.optimiser.b2 = 0.98
    c.evaluate.every = 100
    c.evaluate.rows = 500
    return c
