"""What do 8 and 4 bits cost a model that learns with them, and one that is rounded when it has learnt?

Question: how many held-out bits per byte does the quickstart's model lose with int8 weights and
  activations, and with int4 weights, when the second half of its training sees the rounding and when
  rounding to nearest comes at the end?
Command: python launch.py --experiment=experiments/quantisation
Hardware: 2 CPU cores
Minutes: 50
Expectation: int8 loses less than 0.5 % at no more than 0.27 times the bytes; int4 (32 inputs a scale, the
  embedding too) takes no more than 0.16 times, and loses less when training has seen it; so does int4 with
  one scale an output, by more, for it rounds more coarsely.
Source: Jacob et al. 2017 (1712.05877), sections 3 and 4, on convolutional networks with far longer training.
"""

from ml_collections import ConfigDict

from configs import compress, quickstart

ARMS = {
    "float": "float32 (baseline)",
    "int8": "weights and activations in 8 bits from half of the steps on",
    "int4": "weights in 4 bits from half of the steps on",
    "int4_nearest": "weights in 4 bits, rounded to nearest at the end",
    "int4_output": "weights in 4 bits, one scale an output, from half of the steps on",
    "int4_output_nearest": "the same, rounded to nearest at the end",
}
SEEDS = (0, 1, 2)
QUALITY = ("quality.bits_per_byte",)


def get_config(arm: str) -> ConfigDict:
    c = compress.get_config(arm.replace("_output", ""))
    if "_output" in arm:
        c.compress.quantise.group = 0
    c.name = f"quantisation-{arm}"
    return c


SMOKE = quickstart.SMOKE | {"model.width": 64, "model.ff_width": 128}  # 32 inputs share a scale

CLAIMS = [
    {
        "text": "int8 loses less than 0.5 %",
        "metric": "quality.bits_per_byte",
        "lower": "int8",
        "higher": "float",
        "times": 1 / 1.005,
    },
    {
        "text": "int4 loses less when training has seen it",
        "metric": "quality.bits_per_byte",
        "lower": "int4",
        "higher": "int4_nearest",
    },
    {
        "text": "so does int4 with one scale an output",
        "metric": "quality.bits_per_byte",
        "lower": "int4_output",
        "higher": "int4_output_nearest",
    },
    {
        "text": "int8 takes no more than 0.27 times the bytes",
        "metric": "bytes_on_disk",
        "lower": "int8",
        "higher": "float",
        "times": 1 / 0.27,
    },
    {
        "text": "int4 takes no more than 0.16 times the bytes",
        "metric": "bytes_on_disk",
        "lower": "int4",
        "higher": "float",
        "times": 1 / 0.16,
    },
]
