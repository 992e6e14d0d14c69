"""What does a teacher give a student that is smaller in three ways at once?

Question: a student of half the depth, with windows of attention and int8 weights and activations, learns
  for 120 steps, alone or from a trained teacher too: how much nearer does the teacher bring it to its own
  held-out bits per byte?
Command: python launch.py --experiment=experiments/distillation
Hardware: 2 CPU cores
Minutes: 15
Expectation: the taught student is better than the same student alone by more than its seeds differ, and
  worse than its teacher. Both take less than 0.16 times the teacher's bytes.
Source: Hinton et al. 2015 (1503.02531) for learning from the distribution of a larger model; Sanh et al.
  2019, DistilBERT (1910.01108), for half of the layers; both with far longer training.
"""

from ml_collections import ConfigDict

from configs import quickstart

ARMS = {
    "teacher": "4 layers of full attention, float32, 220 steps",
    "alone": "2 layers with windows of 64 tokens, int8, 120 steps, from the text (baseline)",
    "taught": "the same, from the text and from the first seed's teacher, in equal parts",
}
SEEDS = (0, 1, 2)
QUALITY = ("quality.bits_per_byte",)


def get_config(arm: str) -> ConfigDict:
    c = quickstart.get_config(arm)
    c.name = f"distillation-{arm}"
    c.compress.distil.teacher = "runs/distillation/teacher-0"
    return c


SMOKE = quickstart.SMOKE | {
    "compress.distil.teacher": "runs/smoke/distillation/teacher-0",
    "model.width": 32,
}

CLAIMS = [
    {
        "text": "a teacher is worth more than 0.03 bits per byte",
        "metric": "quality.bits_per_byte",
        "lower": "taught",
        "higher": "alone",
        "by": 0.03,
    },
    {
        "text": "the student stays behind its teacher",
        "metric": "quality.bits_per_byte",
        "lower": "teacher",
        "higher": "taught",
    },
    {
        "text": "the student takes less than 0.16 times the teacher's bytes",
        "metric": "bytes_on_disk",
        "lower": "taught",
        "higher": "teacher",
        "times": 1 / 0.16,
    },
]
