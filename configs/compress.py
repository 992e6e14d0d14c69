"""The quickstart's model made smaller: in fewer bits, with fewer weights, by a teacher, or all at once.

Arms: float (the control), int8, int4, pruned (half of the weights), sparse24 (2 of every 4), distilled (half
the depth, taught by the float arm), stacked (distilled, pruned and int8 at once).
Command: python launch.py --config=configs/compress.py:int8
  distilled and stacked need runs/compress first: python launch.py --config=configs/compress.py
Expect: not run at this length; about the quickstart's four minutes on two cores for float, more for others.
"""

from ml_collections import ConfigDict

from configs import quickstart

ARMS = ("float", "int8", "int4", "pruned", "sparse24", "distilled", "stacked")
TEACHER = "runs/compress"


def get_config(arm: str = "float") -> ConfigDict:
    c = quickstart.get_config()
    c.name = "compress" if arm == "float" else f"compress_{arm}"
    steps = c.train.steps
    c.compress.methods = {
        "float": (),
        "int8": ("quantise",),
        "int4": ("quantise",),
        "pruned": ("prune",),
        "sparse24": ("prune",),
        "distilled": ("distil",),
        "stacked": ("distil", "prune", "quantise"),
    }[arm]
    bits = "int4" if arm == "int4" else "int8"
    c.compress.quantise.format = bits
    c.compress.quantise.rules = (f"embedding={bits}",)
    c.compress.quantise.group = 32 if arm == "int4" else 0
    c.compress.quantise.start = steps // 2
    c.compress.prune.pattern = "2:4" if arm == "sparse24" else ""
    c.compress.prune.start, c.compress.prune.end = steps // 4, steps * 3 // 4
    if arm in ("distilled", "stacked"):
        c.model.layers //= 2
        c.compress.distil.teacher = TEACHER
    return c
