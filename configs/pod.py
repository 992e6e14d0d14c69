"""A language model of 1.3 G parameters for a pod of 256 chips.

Command: python launch.py --mode=compile --config=configs/pod.py --topology=v5e:16x16
  (on any machine, no TPU needed; pip install libtpu)
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.name = "pod"
    c.data.tokeniser = "bpe"
    c.data.vocabulary = 32768
    c.data.length = 8192
    c.model.layers = 24
    c.model.width = 2048
    c.model.heads = 16
    c.model.ff_width = 5632
    c.model.dtype = "bfloat16"
    c.model.remat = ("full",)
    c.model.scan = True
    c.model.loss_chunk = 1024
    c.train.steps = 100000
    c.train.batch = 256
    c.optimiser.learning_rate = 3e-4
    c.optimiser.warmup_steps = 2000
    c.mesh.data = 1
    c.mesh.fsdp = -1
    return c
