"""A language model of 1.3 G parameters for a pod of 256 chips, at any length of row.

Arms: the length in units of 1024 tokens, 8k, 32k, 128k; a step has 2 M tokens in each, and rows longer
than 8k are split in time. The mixer is config.model.attention.name.
Command: python launch.py --mode=compile --config=configs/pod.py:8k --topology=v5e:16x16
  (on any machine, no TPU needed; pip install libtpu); several, as docs/training.md has them: python
  tests/pod_table.py
"""

from ml_collections import ConfigDict

from configs import base

ARMS = ("8k", "32k", "128k")
SHARD, TOKENS = 8192, 2**21  # of a row that one chip holds, of a step


def get_config(arm: str = "8k") -> ConfigDict:
    c = base.get_config()
    c.name = "pod" if arm == "8k" else f"pod-{arm}"
    c.data.tokeniser = "bpe"
    c.data.vocabulary = 32768
    c.data.length = 1024 * int(arm.removesuffix("k"))
    c.model.layers = 24
    c.model.width = 2048
    c.model.heads = 16
    c.model.ff_width = 5632
    c.model.dtype = "bfloat16"
    c.model.remat = ("full",)
    c.model.scan = True
    c.model.loss_chunk = 1024
    c.train.steps = 100000
    c.train.batch = TOKENS // c.data.length
    c.optimiser.learning_rate = 3e-4
    c.optimiser.warmup_steps = 2000
    c.mesh.data = 1
    c.mesh.fsdp = -1
    c.mesh.sequence = max(1, c.data.length // SHARD)
    return c
