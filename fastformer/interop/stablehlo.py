"""StableHLO by ``jax.export``: prefill and decode as programs that need no code of ours, and the weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import export
from safetensors.numpy import save_file

from fastformer.attention import VARIANTS
from fastformer.attention.mixer import able
from fastformer.core.errors import UserError
from fastformer.core.seq import Seq, whole
from fastformer.data.tokenisers import Tokeniser
from fastformer.interop.spelling import to_library

PLATFORMS = ("cpu", "cuda", "tpu")
SCRIPT = '''"""Continue a prompt, greedily: python run.py "Some text"."""
import json
import sys
from pathlib import Path

import numpy as np
from jax import export
from safetensors.numpy import load_file
from tokenizers import Tokenizer

here = Path(__file__).parent
about = json.loads((here / "about.json").read_text())
weights, text = load_file(here / "weights.safetensors"), Tokenizer.from_file(str(here / "tokenizer.json"))
programs = ((here / f"{name}.stablehlo").read_bytes() for name in ("prefill", "decode"))
prefill, decode = (export.deserialize(program).call for program in programs)
tokens = [about["end"], *text.encode(sys.argv[1]).ids]
row = np.zeros((1, about["capacity"]), np.int32)
row[0, : len(tokens)] = tokens
logits, state = prefill(weights, row, np.array([len(tokens)], np.int32))
while len(tokens) < about["capacity"] and (new := int(np.argmax(logits[0]))) != about["end"]:
    tokens.append(new)
    logits, state = decode(weights, np.array([new], np.int32), np.array([len(tokens) - 1], np.int32), state)
print(text.decode(tokens[1:]))
'''


def write(folder: Path, model: Any, params: Any, tokeniser: Tokeniser) -> None:
    """Write both programs, for one row of at most the trained length, the weights, and what runs them.

    Raises:
      UserError: the model does not decode token by token.
    """
    for name in model.config.variants:
        if not VARIANTS[name].streaming:
            raise UserError(
                f"--format: stablehlo: {name} does not decode token by token; {able('streaming')}"
            )
    model = model.clone(config=dataclasses.replace(model.config, implementation="xla"))
    capacity, flat = model.length, flatten_dict(params, sep="/")
    weights = {path: np.asarray(x) for path, x in flat.items()}
    tree = jax.tree.structure(jax.eval_shape(lambda: model.init_state(1, capacity)))

    def apply(weights: Any, tokens_BT: jax.Array, seq: Seq, state: Any) -> tuple[jax.Array, Any]:
        return model.apply({"params": unflatten_dict(weights, sep="/")}, tokens_BT, seq, state)

    def first(weights: Any, tokens_BT: jax.Array, lengths_B: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        place_BT = jnp.arange(capacity, dtype=jnp.int32)[None]
        last_BT = jnp.broadcast_to(lengths_B[:, None] - 1, place_BT.shape)
        seq = Seq((place_BT < lengths_B[:, None]).astype(jnp.int32), place_BT, last_BT)
        logits_BTV, state = apply(weights, tokens_BT, seq, model.init_state(1, capacity))
        last_BV = jnp.take_along_axis(logits_BTV, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
        return last_BV, jax.tree.leaves(state)

    def then(weights: Any, token_B: jax.Array, position_B: jax.Array, state: list[jax.Array]):
        seq = whole(1, 1, position_B[0])
        logits_B1V, state = apply(weights, token_B[:, None], seq, jax.tree.unflatten(tree, state))
        return logits_B1V[:, 0], jax.tree.leaves(state)

    one, row = jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((1, capacity), jnp.int32)
    shapes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in weights.items()}
    state = jax.eval_shape(first, shapes, row, one)[1]
    programs = {
        "prefill": export.export(jax.jit(first), platforms=PLATFORMS)(shapes, row, one),
        "decode": export.export(jax.jit(then), platforms=PLATFORMS)(shapes, one, one, state),
    }
    for name, program in programs.items():
        (folder / f"{name}.stablehlo").write_bytes(program.serialize())
    save_file(weights, folder / "weights.safetensors")
    (folder / "tokenizer.json").write_text(to_library(tokeniser)[0], "utf-8")
    (folder / "about.json").write_text(json.dumps({"end": tokeniser.eod, "capacity": capacity}) + "\n")
    (folder / "run.py").write_text(SCRIPT)
