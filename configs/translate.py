"""English to German on LibreOffice's help, by an encoder and a decoder.

Command: python launch.py --mode=prepare --config=configs/translate.py (once, where apt-get is), then
  python launch.py --config=configs/translate.py (44 minutes on two CPU cores).
  --config.model.name=decoder --config.model.encoder_layers=0 makes it a decoder that reads the source as
  its prompt, --config.model.prefix_lm=True besides one whose source sees all of itself.
Expect: BLEU 25 on held-out pages, where copying the source gives 7.5; a vocabulary as small as this is
  what so few pairs want (Sennrich and Zhang 2019, 1905.11901).
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.name = "translate"
    c.task = ConfigDict({"name": "translate", "label_smoothing": 0.1, "sentences": 500})
    c.data.source = "libreoffice_help:de"
    c.data.tokeniser = "bpe"
    c.data.vocabulary = 2000
    c.data.length = 256
    c.model.name = "encoder_decoder"
    c.model.encoder_layers = 2
    c.model.layers = 2
    c.model.width = 160
    c.model.heads = 4
    c.model.positions = "sinusoidal"  # says where to look in the source before anything else does
    c.train.steps = 4400
    c.train.batch = 8
    c.optimiser.name = "muon"
    c.optimiser.learning_rate = 1e-2
    c.evaluate.every = 500
    c.generate.tokens = 128
    c.generate.beams = 4
    return c
