"""Directories as Hugging Face's transformers reads and writes them: settings, safetensors, tokeniser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fastformer.core.errors import MALFORMED, UserError
from fastformer.data.tokenisers import BPETokeniser, Tokeniser, WordPieceTokeniser
from fastformer.interop import bert, families
from fastformer.interop.families import GPT2, LLAMA, Family
from fastformer.interop.spelling import to_library

FAMILIES = {"llama": LLAMA, "mistral": LLAMA, "gpt2": GPT2, "bert": bert.BERT}  # by model_type
INDEX, WEIGHTS, CONFIG, TOKENISER = (
    "model.safetensors.index.json",
    "model.safetensors",
    "config.json",
    "tokenizer.json",
)
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")  # names of the end of a document


def fetch(name: str) -> Path:
    """Return the directory of a model of the hub, fetched unless it is there already.

    Raises:
      UserError: it cannot be fetched.
    """
    import huggingface_hub

    patterns = ["*.safetensors", INDEX, CONFIG, TOKENISER, "tokenizer_config.json"]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # of many libraries, when there is no network or no such model
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"--weights: {name} is no file or directory here, and cannot be fetched from Hugging Face "
            f"({type(error).__name__}: {reason}); fetch it elsewhere and give its directory"
        ) from error


def settings(folder: Path) -> tuple[Family, dict[str, Any], int]:
    """Return the family of the model in ``folder``, config.model's settings, and the tokens it can hold.

    Raises:
      UserError: it cannot be read, or is none of ours.
    """
    found = _json(folder / CONFIG)
    kind = found.get("model_type")
    if kind not in [*FAMILIES]:  # a list, for it may have no hash
        raise families.refused("model_type", kind, ", ".join(FAMILIES))
    return FAMILIES[kind], *families.settled(FAMILIES[kind], found, str(folder / CONFIG))


def weights(folder: Path, family: Family) -> dict[str, np.ndarray]:
    """Return the weights by their names there, float32.

    Raises:
      UserError: there are none as safetensors, or they cannot be read.
    """
    files = [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        try:
            files = [folder / name for name in sorted(set(_json(folder / INDEX)["weight_map"].values()))]
        except MALFORMED as error:
            raise UserError(f"--weights: {folder / INDEX} is no index of safetensors") from error
    for path in files:
        if not path.is_file():
            others = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
            more = f"; {others[0].name} may run code when it is read: convert it first" if others else ""
            raise UserError(f"--weights: {folder} holds no {path.name}{more}")
    found = {}
    for path in files:
        try:
            with safe_open(path, framework="flax") as file:
                found |= {name: np.asarray(file.get_tensor(name), np.float32) for name in file.keys()}
        except (OSError, SafetensorError, ValueError) as error:
            raise UserError(f"--weights: {path} cannot be read ({str(error).splitlines()[0]})") from error
    try:
        return dict(family.tidy(found))
    except MALFORMED as error:
        raise UserError(f"--weights: {folder} holds no weights of a {family.name} ({error})") from error


def tokeniser(folder: Path, vocabulary: int) -> Tokeniser:
    """Return the tokeniser in ``folder`` for a model of ``vocabulary`` tokens.

    Raises:
      UserError: there is none, or one whose tokens are neither made of bytes nor BERT's word pieces.
    """
    path, theirs = folder / TOKENISER, {}
    if not path.is_file():
        raise UserError(f"--weights: {folder} holds no {TOKENISER}")
    if (folder / "tokenizer_config.json").is_file():
        theirs = _json(folder / "tokenizer_config.json")
    end = theirs.get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    try:
        text = path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"--weights: {path} cannot be read ({error})") from error
    return from_library(text, end, vocabulary, str(path))


def from_library(model: str, end: str | None, vocabulary: int, name: str) -> Tokeniser:
    """Return our form of a tokeniser of the library tokenizers.

    Args:
      model: its JSON. end: the token that ends what is written, taken where no usual one ends documents.

    Raises:
      UserError: it is of another kind, or has no end of document.
    """
    import tokenizers

    try:
        if json.loads(model)["model"]["type"] == "WordPiece":
            return WordPieceTokeniser(model, vocabulary)
        found = tokenizers.Tokenizer.from_str(model)
        ids = [found.token_to_id(token) for token in (*ENDS[:1], end, *ENDS) if token]
        ids = [number for number in ids if number is not None]
        if not ids:
            raise ValueError("it has no token that ends a document")
        if found.get_vocab_size() > vocabulary:
            raise ValueError(f"it has {found.get_vocab_size()} tokens, and the model {vocabulary}")
        return BPETokeniser(model, ids[0], vocabulary)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise UserError(f"--weights: {name} is no byte-level or WordPiece tokeniser ({error})") from error


def write(folder: Path, model: Any, params: Any, tokeniser: Tokeniser) -> None:
    """Write a directory that transformers reads.

    Raises:
      UserError: none of its families is this model.
    """
    config = model.config
    encoder = type(model).__name__ == "Encoder"
    family = bert.family_of(config) if encoder else families.family_of(config)
    tensors = families.back(family, params, config.layers, config.tied)
    tensors = families.join(tensors) if family is GPT2 else tensors
    text, end = to_library(tokeniser)
    ends = {} if encoder else {"eos_token_id": tokeniser.eod, "bos_token_id": tokeniser.eod}
    described = family.back(config, model.vocabulary, model.length) | ends
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(described, indent=2) + "\n")
    (folder / TOKENISER).write_text(text, "utf-8")
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "bos_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"--weights: {path.parent} holds no {path.name}") from error
    except (OSError, *MALFORMED) as error:
        raise UserError(f"--weights: {path} cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"--weights: {path} holds no settings")
    return found
