"""The quickstart's model made smaller: in fewer bits, with fewer weights, by a teacher, or all at once.

Arms: float (the control), int8, int4, pruned (half of the weights), sparse24 (2 of every 4), distilled (half
the depth, taught by the float arm), stacked (distilled, pruned and int8 at once). Once, when training has
ended: int4_nearest, int4_gptq, int4_awq; magnitude, wanda, sparsegpt (half of the weights), and the same with
2 of every 4 as magnitude24, wanda24, sparsegpt24.
Command: python launch.py --config=configs/compress.py:int8
  distilled and stacked need runs/compress first: python launch.py --config=configs/compress.py
Expect: float is the quickstart's teacher (1.897 held-out bits per byte), stacked 1.890 in 0.115 times the
  bytes; int8 and int4 as in experiments/quantisation. Three to five minutes each; other arms: not run.
"""

from ml_collections import ConfigDict

from configs import quickstart

ROUNDED = ("int4_nearest", "int4_gptq", "int4_awq")
SPARSE = ("magnitude", "wanda", "sparsegpt", "magnitude24", "wanda24", "sparsegpt24")
ARMS = ("float", "int8", "int4", "pruned", "sparse24", "distilled", "stacked", *ROUNDED, *SPARSE)
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
        **dict.fromkeys(ROUNDED, ("quantise",)),
        **dict.fromkeys(SPARSE, ("prune",)),
    }[arm]
    bits = "int4" if arm.startswith("int4") else "int8"
    c.compress.quantise.format = bits
    c.compress.quantise.rules = (f"embedding={bits}",)
    c.compress.quantise.group = 32 if bits == "int4" else 0
    c.compress.quantise.start = steps // 2
    c.compress.prune.pattern = "2:4" if arm.endswith("24") else ""
    c.compress.prune.start, c.compress.prune.end = steps // 4, steps * 3 // 4
    if arm in ROUNDED:
        c.compress.quantise.start = steps
        c.compress.quantise.rounding = arm.removeprefix("int4_")
    if arm in SPARSE:
        c.compress.prune.score = arm.removesuffix("24")
        last = steps if c.compress.prune.score == "magnitude" else 0
        c.compress.prune.start = c.compress.prune.end = last
    if arm in ("distilled", "stacked"):
        c.model.layers //= 2
        c.compress.distil.teacher = TEACHER
    return c
