"""A language model of Python code, and a smaller one that it teaches, from nothing to a table on a laptop.

Arms: teacher, with full attention; then, by the same command, alone, a student of half the depth with windows
of attention and int8 weights and activations (quantisation-aware), and taught, the same student distilled
from the teacher. `:teacher` trains the first alone, as does the command with any key changed.
Command: python launch.py --config=configs/quickstart.py
Expect: six minutes on two CPU cores (longer where they have other work); with Python 3.11.7 the teacher
  needs 1.90 held-out bits per byte, where gzip -9 needs 1.92 and xz -9 1.63, the student 2.07 alone and 1.96
  taught, both in 0.15 times the bytes. Held-out rows overlap by half, so that every token has 128 before it.
"""

from ml_collections import ConfigDict

from configs import base

ARMS = ("teacher", "alone", "taught")
THEN = ("alone", "taught")
SMOKE = {  # what makes it a matter of seconds, for experiments that begin with it
    "data.vocabulary": 512,
    "data.length": 64,
    "train.steps": 6,
    "compress.quantise.start": 3,
    "optimiser.warmup_steps": 2,
    "evaluate.overlap": 0,
    "evaluate.batch": 64,
    "generate.tokens": 8,
}


def get_config(arm: str = "teacher") -> ConfigDict:
    c = base.get_config()
    c.name = "quickstart"
    c.data.tokeniser = "bpe"
    c.data.vocabulary = 2048
    c.data.length = 256
    c.model.layers = 4
    c.model.width = 192
    c.model.heads = 2
    c.model.short_conv = 4  # at so few steps worth more than any other choice here
    c.train.steps = 220
    c.train.batch = 8
    c.optimiser.name = "muon"  # ahead of adamw at so few steps
    c.optimiser.learning_rate = 1.5e-2
    c.optimiser.b1 = 0.8
    c.optimiser.warmup_steps = 20
    c.optimiser.final_fraction = 0.02
    c.evaluate.every = 0
    c.evaluate.overlap = 128
    c.evaluate.batch = 16
    c.checkpoint.every = 100
    c.generate.tokens = 200
    c.generate.temperature = 0.7
    c.generate.prompt = "def __init__(self, name"
    if arm != "teacher":
        c.name = f"quickstart_{arm}"
        c.model.layers = 2
        c.model.attention.name = "local"
        c.model.attention.window = 64
        c.train.steps = 120
        c.compress.methods = ("distil", "quantise") if arm == "taught" else ("quantise",)
        c.compress.distil.teacher = "runs/quickstart"
        c.compress.quantise.rules = ("embedding=int8",)
        c.compress.quantise.start = c.train.steps // 2
    return c
