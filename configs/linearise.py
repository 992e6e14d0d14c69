"""The quickstart's model with its softmax turned into something cheaper, with the weights that it has.

Arms: lolcats (softmax in a window of 32 tokens, a learned feature map beyond), hedgehog (the map alone),
hybrid (hedgehog and softmax in turn), local (the window alone); softmax (the control: as many more steps of
the same adapters); and lolcats_untaught (the whole of the run on the task, without attention transfer).
Command: python launch.py --config=configs/linearise.py:lolcats
  needs runs/quickstart first: python launch.py --config=configs/quickstart.py
  of another model, the same section model, and: --config.compress.linearise.teacher=runs/other
Expect: experiments/linearisation, which is made of these: lolcats at the bits per byte of softmax, to 0.01 %,
  by its window; hedgehog 1.6 % above it, hybrid 0.7 %.
"""

from ml_collections import ConfigDict

from configs import quickstart

ARMS = ("lolcats", "hedgehog", "hybrid", "local", "softmax", "lolcats_untaught")
TEACHER = "runs/quickstart"
WINDOW = 32


def get_config(arm: str = "lolcats") -> ConfigDict:
    c = quickstart.get_config()
    c.name = "linearise" + f"_{arm}" * (arm != "lolcats")
    mixer = arm.removesuffix("_untaught")
    c.model.attention.name = "hedgehog" if arm == "hybrid" else mixer
    if mixer in ("lolcats", "local"):
        c.model.attention.window = WINDOW
    if arm == "hybrid":
        c.model.pattern = ("hedgehog", "softmax")
    c.train.steps = 80
    c.compress.methods = ("linearise",)
    c.compress.linearise.teacher = TEACHER
    c.compress.linearise.transfer = 40 if arm in ("lolcats", "hedgehog", "hybrid") else 0
    c.optimiser.name = "adamw"
    c.optimiser.learning_rate = 1e-2  # of attention transfer, as published
    c.optimiser.groups = (("^linearise/", 0.1, None),)  # the adapters
    c.optimiser.schedule = "wsd"
    c.optimiser.warmup_steps = 5
    c.optimiser.weight_decay = 0.0
    return c
