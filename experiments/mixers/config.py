"""Which mixer, at one size and for one number of tokens?

Question: how much quality do a sliding window and a constant state give up against full softmax
  attention, and what do they save, in the same small model trained on the same tokens?
Command: python launch.py --experiment=experiments/mixers
Hardware: 2 CPU cores
Minutes: 22
Expectation: softmax predicts best and linear (elu + 1, without decay) worst, for it cannot forget
  or pick out one token; a window of 64 lies close to softmax, since most of what the next token
  needs stands nearby. linear keeps the smallest state, whatever the length, and softmax the largest.
Source: Katharopoulos et al. 2020 (2006.16236), section 4.3, where linear attention recognises speech
  worse than softmax; Child et al. 2019 (1904.10509), section 4.1, where many layers learn to look
  nearby. The margins are our guesses.
"""

from ml_collections import ConfigDict

from configs import base

ARMS = {
    "softmax": "every token sees all before it; the state grows with the sequence (baseline)",
    "local": "every token sees the last 64; the state is a ring of 64 slots",
    "linear": "feature map elu + 1; the state is one matrix a head",
}
SEEDS = (0, 1, 2)
WINDOW = 64  # an eighth of the row


def get_config(arm: str) -> ConfigDict:
    c = base.get_config()
    c.name = f"mixers-{arm}"
    c.data.tokeniser = "bpe"
    c.data.vocabulary = 1024
    c.data.length = 512
    c.model.layers = 3
    c.model.width = 128
    c.model.heads = 4
    c.model.attention.name = arm
    if arm == "local":
        c.model.attention.window = WINDOW
    c.train.steps = 300
    c.train.batch = 4
    c.optimiser.name = "muon"
    c.optimiser.learning_rate = 1e-2
    c.optimiser.warmup_steps = 30
    c.evaluate.every = 100
    c.evaluate.rows = 64
    c.evaluate.batch = 16
    c.checkpoint.every = 150
    c.generate.prompt = "def "
    return c


SMOKE = {
    "data.length": 128,
    "model.layers": 2,
    "model.width": 64,
    "train.steps": 10,
    "optimiser.warmup_steps": 2,
    "evaluate.every": 5,
    "evaluate.rows": 8,
    "checkpoint.every": 5,
    "generate.tokens": 16,
}

CLAIMS = [
    {
        "text": "softmax predicts better than linear",
        "metric": "quality.bits_per_byte",
        "lower": "softmax",
        "higher": "linear",
    },
    {
        "text": "local predicts better than linear",
        "metric": "quality.bits_per_byte",
        "lower": "local",
        "higher": "linear",
    },
    {
        "text": "a window of 64 is within 0.05 bits per byte of softmax",
        "metric": "quality.bits_per_byte",
        "lower": "local",
        "higher": "softmax",
        "by": -0.05,
    },
    {
        "text": "the state of local is less than a quarter of softmax's at 512 tokens",
        "metric": "state_bytes",
        "lower": "local",
        "higher": "softmax",
        "times": 4,
    },
    {
        "text": "the state of linear is smaller than local's",
        "metric": "state_bytes",
        "lower": "linear",
        "higher": "local",
    },
]
