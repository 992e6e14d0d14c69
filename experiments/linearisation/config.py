"""How much of a trained softmax model is left when its attention is made linear, and who keeps it?

Question: the quickstart's trained model gets a window of 32 tokens, a learned feature map, or both, with
  attention transfer and low-rank tuning of 80 steps in all: how many held-out bits per byte does each lose
  against softmax with as many steps of the same adapters, and what do the window and the linear part of a
  hybrid keep alone?
Command: python launch.py --experiment=experiments/linearisation
Hardware: 2 CPU cores
Minutes: 25
Expectation: lolcats loses least and hedgehog, which has no window, most; transfer helps. Of lolcats the
  window alone comes near to both together, and the linear part alone is far off.
Source: Zhang et al. 2024, Hedgehog (2402.04347) and LoLCATs (2410.10254); Benfeghoul et al. 2025
  (2510.05901), where hybrids bypass their linear part; all on larger models.
"""

from ml_collections import ConfigDict

from configs import linearise, quickstart

ARMS = {
    "teacher": "softmax, 220 steps: what the others begin with, its first seed",
    "softmax": "80 steps more of the same adapters (baseline)",
    "lolcats": "softmax in a window of 32 tokens, a learned feature map beyond",
    "lolcats_untaught": "the same without attention transfer, all 80 steps on the text",
    "local": "the window alone",
    "hedgehog": "the feature map alone",
    "hybrid": "hedgehog and softmax layers in turn",
}
SEEDS = (0, 1)
QUALITY = (
    "quality.bits_per_byte",
    "quality.bits_per_byte_window_alone",
    "quality.bits_per_byte_linear_alone",
)


def get_config(arm: str) -> ConfigDict:
    c = quickstart.get_config("teacher") if arm == "teacher" else linearise.get_config(arm)
    c.name = f"linearisation-{arm}"
    c.compress.linearise.teacher = "runs/linearisation/teacher-0"
    return c


SMOKE = quickstart.SMOKE | {
    "compress.linearise.teacher": "runs/smoke/linearisation/teacher-0",
    "model.width": 32,
}


def _than(lower: str, higher: str, text: str, metric: str = "quality.bits_per_byte", **more: float) -> dict:
    return {"text": text, "metric": metric, "lower": lower, "higher": higher, **more}


CLAIMS = [
    _than("softmax", "lolcats", "a window and a feature map cost quality"),
    _than("lolcats", "lolcats_untaught", "attention transfer helps"),
    _than("lolcats", "local", "the feature map adds to the window"),
    _than("lolcats", "hedgehog", "the window adds to the feature map"),
    _than("hybrid", "hedgehog", "every other softmax layer keeps more than none"),
]
