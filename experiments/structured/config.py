"""What does a model lose, and how much faster is it, when whole neurons or layers are cut out of it?

Question: the quickstart's trained model is cut to half of its feed-forward neurons or of its layers, and
  trained for half as many steps again: how many held-out bits per byte does each cost against as many more
  steps without a cut, and how much faster does each train and decode?
Command: python launch.py --experiment=experiments/structured
  needs runs/quickstart first: python launch.py --config=configs/quickstart.py
Hardware: 2 CPU cores
Minutes: 15
Expectation: each cut trains faster, layers most, for what is cut is gone and not zeros; each costs quality,
  and neurons least, chosen by what they do on training text.
Source: Muralidharan et al. 2024, Minitron (2407.14679), for importance, and for width that is cut with less
  loss than depth; on models a thousand times as large.
"""

from ml_collections import ConfigDict

from configs import quickstart

CUTS = {"half_ff": "ff_width", "half_layers": "layers"}
ARMS = {
    "whole": "4 layers, 2 heads of 96, 512 neurons: 110 steps more without a cut (baseline)",
    "half_ff": "256 neurons, 110 steps more",
    "half_layers": "2 layers, those that change the stream most, 110 steps more",
}
SEEDS = (0, 1, 2)
QUALITY = ("quality.bits_per_byte",)


def get_config(arm: str) -> ConfigDict:
    c = quickstart.get_config("teacher")
    c.name = f"structured-{arm}"
    c.model.head_width = c.model.width // c.model.heads
    c.model.ff_width = 512
    c.train.init = "runs/quickstart"
    c.train.init_layers = "change"
    c.train.steps //= 2
    c.optimiser.learning_rate /= 2
    if arm in CUTS:
        c.model[CUTS[arm]] //= 2
    return c


SMOKE = quickstart.SMOKE | {"train.init": "", "model.width": 32, "model.head_width": 16}


def _than(lower: str, higher: str, text: str, metric: str = "quality.bits_per_byte", **more: float) -> dict:
    return {"text": text, "metric": metric, "lower": lower, "higher": higher, **more}


PACE, DECODING, SIZE = "train_tokens_per_second", "decode_tokens_per_second", "bytes_on_disk"
CLAIMS = [
    _than("whole", "half_ff", "half of the neurons train 1.1 times as fast", PACE, times=1.1),
    _than("whole", "half_layers", "half of the layers train 1.5 times as fast", PACE, times=1.5),
    _than("whole", "half_ff", "half of the neurons decode faster", DECODING),
    _than("whole", "half_layers", "half of the layers decode faster", DECODING),
    _than("whole", "half_ff", "half of the neurons cost quality"),
    _than("half_ff", "half_layers", "they cost less than half of the layers"),
    _than("half_ff", "whole", "half of the neurons take less than 0.8 of the bytes", SIZE, times=1.25),
]
