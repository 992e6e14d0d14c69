"""A pretrained model from elsewhere, on the documentation of the Python that runs this.

Command: python launch.py --mode=import --config=configs/imported.py --weights=FILE.gguf
Then: python launch.py --mode=evaluate --workdir=runs/imported
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.name = "imported"  # the section model becomes that of what is imported
    c.data.source = "python_docs"
    c.data.length = 512
    c.train.batch = 2
    c.evaluate.rows = 64
    c.generate.tokens = 32
    return c
