"""A language model of the running Python's documentation.

Command: python launch.py --config=configs/lm.py (2 MB of prose; about half an hour on two cores, not run)
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.name = "lm"
    c.data.source = "python_docs"
    c.data.tokeniser = "bpe"
    c.generate.prompt = "Return "
    return c
