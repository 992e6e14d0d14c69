"""Our models in the formats of others."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastformer.core.errors import UserError, lookup
from fastformer.data.tokenisers import Tokeniser
from fastformer.interop import gguf_file, huggingface, stablehlo


def _gguf(kind: str, folder: Path, model: Any, params: Any, tokeniser: Tokeniser) -> None:
    gguf_file.write(folder / f"model-{kind}.gguf", model, params, tokeniser, kind)


FORMATS: dict[str, Callable[[Path, Any, Any, Tokeniser], None]] = {
    "huggingface": huggingface.write,
    "gguf": functools.partial(_gguf, "f16"),
    "gguf:q8_0": functools.partial(_gguf, "q8_0"),
    "gguf:q4_0": functools.partial(_gguf, "q4_0"),
    "stablehlo": stablehlo.write,
}


def write(name: str, output: str, model: Any, params: Callable[[], Any], tokeniser: Tokeniser | None) -> Path:
    """Write a model to the folder ``output`` in the format ``name``; return the folder.

    Args:
      params: reads the weights, float32.

    Raises:
      UserError: no such format, one that cannot hold the model, or a folder that is not empty.
    """
    form = lookup(FORMATS, name, "--format")
    held = ("Decoder", "Encoder") if name == "huggingface" else ("Decoder",)
    if tokeniser is None or type(model).__name__ not in held:
        kinds = " or an encoder" * (len(held) > 1)
        raise UserError(f"--format: {name} holds a decoder{kinds} of text, and this run has another model")
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output: {output} is there already; name a new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        form(folder, model, params(), tokeniser)
    except OSError as error:
        raise UserError(f"--output: {output} cannot be written ({error})") from error
    except UserError:
        if not any(folder.iterdir()):
            folder.rmdir()
        raise
    return folder
