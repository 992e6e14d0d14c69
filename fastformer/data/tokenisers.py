"""From text to tokens and back: bytes and a byte-level BPE, without loss; BERT's word pieces, with some."""

from __future__ import annotations

import abc
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tokenizers
from tokenizers import Regex, models, pre_tokenizers, trainers

from fastformer.core.errors import UserError
from fastformer.data.atomic import atomic

FILE = "tokeniser.json"  # in a run's workdir
TRAINING_CHARACTERS = 2**28  # a BPE is trained on the first so many of a very large corpus
PIECE_CHARACTERS = 2**20  # longer documents are tokenised in pieces that end at line breaks

# The pieces that no BPE token reaches beyond: a line break with the indent after it, alone or behind
# punctuation ("):\n        "); a word with the one character before it (".append", "(self", " in"); a
# digit; a run of spaces. On python_code at 4096 tokens this gives 3.62 held-out bytes a token, GPT-2's
# pattern 3.41. Whole lines as pieces give 4.02, but then a prompt rarely ends where a token does.
PATTERN = "|".join(
    (
        r"\r?\n[ \t\r\n]*",
        r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}_]+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+ ?(?:\r?\n[ \t\r\n]*)?",
        r"[ \t]+(?=[^\s])",
        r"\s+",
    )
)


class Tokeniser(abc.ABC):
    """Tokens are byte strings; the last one is the end of a document and stands for no byte.

    Attributes:
      token_bytes: what each token stands for.
      lossless: a text comes back from its tokens as it was.
    """

    token_bytes: list[bytes]
    lossless: ClassVar[bool] = True

    @abc.abstractmethod
    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each text, never the end of document; lone surrogates become ``?``."""

    @abc.abstractmethod
    def state(self) -> dict[str, Any]:
        """Return what ``load_tokeniser`` rebuilds it from."""

    @property
    def size(self) -> int:
        """V: the number of tokens, end of document included."""
        return len(self.token_bytes)

    @property
    def eod(self) -> int:
        """The token between documents."""
        return self.size - 1

    def mark(self, number: int) -> int:
        """Return a token that no text is ever written with: byte 0xFF less ``number``, which UTF-8 lacks.

        Args:
          number: 0 to 6; those of one run must differ.

        Raises:
          UserError: the tokeniser has no token for single bytes.
        """
        byte = bytes([0xFF - number])
        if byte not in self.token_bytes:
            raise UserError("config.data.tokeniser: has no token of a byte alone to use as a mark")
        return self.token_bytes.index(byte)

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        """The bytes of each token, int64 ``[V]``."""
        return np.array([len(token) for token in self.token_bytes], np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that decides which tokens a text has."""
        return hashlib.sha256(json.dumps(self.state(), sort_keys=True).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the tokens of ``text``, as ``encode_all`` does."""
        return self.encode_all([text])[0]

    def alone(self, text: str, most: int) -> list[int]:
        """Return at most ``most`` tokens of a text that is a row by itself, with what marks its beginning."""
        return [self.eod, *self.encode(text)][:most]

    def to_bytes(self, tokens: Iterable[int]) -> bytes:
        """Return the bytes that tokens stand for."""
        return b"".join(map(self.token_bytes.__getitem__, tokens))

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens; bytes that are not UTF-8 become U+FFFD."""
        return self.to_bytes(tokens).decode("utf-8", "replace")

    def save(self, workdir: Path) -> None:
        """Keep the tokeniser with a run."""
        with atomic(Path(workdir) / FILE) as file:
            file.write(json.dumps(self.state()).encode())


class ByteTokeniser(Tokeniser):
    """The 256 bytes and the end of document."""

    def __init__(self) -> None:
        self.token_bytes = [bytes([value]) for value in range(256)] + [b""]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode("utf-8", "replace")) for text in texts]

    def state(self) -> dict[str, Any]:
        return {"name": "bytes"}


class BPETokeniser(Tokeniser):
    """Byte-level byte-pair encoding (Sennrich et al. 2016, 1508.07909; on bytes: Radford et al. 2019).

    One that comes from elsewhere may have special tokens, which stand for no byte and which no text spells.

    Attributes:
      model: JSON of the library tokenizers. eod: the end of document, where it is not the last token.
      size: V, where tokens follow that stand for nothing.

    Raises:
      ValueError: tokens are not made of bytes.
    """

    def __init__(self, model: str, eod: int | None = None, size: int | None = None):
        self._model = tokenizers.Tokenizer.from_str(model)
        self._model.encode_special_tokens = True  # as text
        self._json, self._eod = model, eod
        byte_of = {character: value for value, character in byte_characters().items()}
        names, added = self._model.get_vocab(with_added_tokens=False), self._model.get_added_tokens_decoder()
        self.token_bytes = [b""] * (size or len(names) + 1)
        try:
            for token, number in names.items():
                if number not in added or not added[number].special:
                    self.token_bytes[number] = bytes(byte_of[character] for character in token)
        except (KeyError, IndexError) as error:
            raise ValueError(f"the token {token!r} is not made of bytes") from error

    @property
    def eod(self) -> int:
        return super().eod if self._eod is None else self._eod

    @classmethod
    def train(cls, documents: Iterable[str], vocabulary: int) -> BPETokeniser:
        """Return a tokeniser of at most ``vocabulary`` tokens; a small text has fewer."""
        model = tokenizers.Tokenizer(models.BPE())
        model.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        # The end of document is none of the model's tokens, so that no text can spell it.
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary - 1,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        model.train_from_iterator(_first(documents, TRAINING_CHARACTERS), trainer)
        return cls(model.to_str())

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        pieces = [list(_pieces(text.encode("utf-8", "replace").decode())) for text in texts]
        flat = [piece for text in pieces for piece in text]
        encoded = iter(self._model.encode_batch_fast(flat, add_special_tokens=False))
        return [[token for _ in text for token in next(encoded).ids] for text in pieces]

    def state(self) -> dict[str, Any]:
        own = {} if self._eod is None else {"eod": self._eod, "size": self.size}
        return {"name": "bpe", "model": self._json, **own}


class WordPieceTokeniser(Tokeniser):
    """The pieces of words that a BERT knows (Devlin et al. 2018, 1810.04805, section 3), from elsewhere.

    Case, accents and spaces may be lost, and so may what it has no pieces for. The end of a document is
    [SEP]; a text by itself stands between [CLS] and it.

    Attributes:
      model: JSON of the library tokenizers. size: V, where tokens follow that stand for nothing.

    Raises:
      ValueError: it lacks one of BERT's special tokens.
    """

    lossless: ClassVar[bool] = False
    BEGIN, END, MASK = "[CLS]", "[SEP]", "[MASK]"

    def __init__(self, model: str, size: int | None = None):
        self._model, self._json = tokenizers.Tokenizer.from_str(model), model
        self._model.encode_special_tokens = True  # as text
        self._model.no_truncation()
        self._model.no_padding()
        names, added = self._model.get_vocab(), self._model.get_added_tokens_decoder()
        for name in (self.BEGIN, self.END, self.MASK):
            if name not in names:
                raise ValueError(f"it has no {name}")
        self._names = names
        self.token_bytes = [b""] * (size or len(names))
        for token, number in names.items():
            if number not in added or not added[number].special:
                inside = token.startswith("##")
                self.token_bytes[number] = (token[2:] if inside else f" {token}").encode()

    @property
    def eod(self) -> int:
        return self._names[self.END]

    def mark(self, number: int) -> int:
        name = f"[unused{number}]" if number else self.MASK
        if name not in self._names:
            raise UserError(f"config.data.tokeniser: has no {name} to use as a mark")
        return self._names[name]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        texts = [text.encode("utf-8", "replace").decode() for text in texts]
        return [found.ids for found in self._model.encode_batch_fast(texts, add_special_tokens=False)]

    def alone(self, text: str, most: int) -> list[int]:
        return [self._names[self.BEGIN], *self.encode(text)[: most - 2], self.eod][:most]

    def decode(self, tokens: Sequence[int]) -> str:
        return super().decode(tokens).strip()

    def state(self) -> dict[str, Any]:
        return {"name": "wordpiece", "model": self._json, "size": self.size}


OF_RUN = "run:"  # begins the name of the tokeniser that a run keeps
TOKENISERS = {"bytes": ByteTokeniser, "bpe": BPETokeniser}
IMPORTED = {"wordpiece": WordPieceTokeniser}  # not trained here


def load_tokeniser(workdir: Path) -> Tokeniser:
    """Return the tokeniser that a run was trained with.

    Raises:
      UserError: the workdir holds none, or one that cannot be read.
    """
    path = Path(workdir) / FILE
    try:
        state = json.loads(path.read_text())
        return {**TOKENISERS, **IMPORTED}[state.pop("name")](**state)
    except FileNotFoundError as error:
        raise UserError(f"{workdir}: holds no {FILE}; is it the workdir of a run?") from error
    except Exception as error:  # tokenizers raises bare Exceptions
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {error}); restore it") from error


def byte_characters() -> dict[int, str]:
    """Return the printable character by which a byte-level BPE writes each byte.

    A printable Latin-1 byte is its own character; the others are U+0100 and on, in order.
    """
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in own]
    return {value: chr(value) for value in own} | {value: chr(256 + i) for i, value in enumerate(others)}


def _first(documents: Iterable[str], characters: int) -> Iterator[str]:
    for text in documents:
        if characters <= 0:
            return
        yield text[:characters].encode("utf-8", "replace").decode()
        characters -= len(text)


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        end = text.rfind("\n", start, start + PIECE_CHARACTERS)
        end = start + PIECE_CHARACTERS if end <= start else end
        yield text[start:end]
        start = end
    yield text[start:]
