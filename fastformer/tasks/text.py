"""Text generation: predict the next token, for prose and code alike."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastformer.core.errors import require
from fastformer.data import open_data
from fastformer.tasks.diversity import diversity
from fastformer.tasks.next_token import NextToken, perplexity


@dataclass(frozen=True)
class Text(NextToken):
    """Next-token prediction on packed rows of text.

    Attributes:
      continued: held-out documents whose beginning is continued at the end, to see how diverse that is; 0
        is none. ``beginning``: words of each that are given.
    """

    metric = "bits_per_byte"

    asks = ("prompt",)

    name: str = "text"
    continued: int = 0
    beginning: int = 16

    def __post_init__(self) -> None:
        require(self.continued >= 0, "continued", self.continued, "0 (none) or more")
        require(self.beginning >= 1, "beginning", self.beginning, "1 or more")

    def open(self, data, workdir, config):
        return open_data(data, workdir)

    def quality(self, sums, data, limit, overlap):
        size = data.heldout_bytes_of(limit, overlap)
        bits = {"bits_per_byte": sums["nats"] / math.log(2) / max(size, 1)}
        return bits | perplexity(sums["nats"], sums["targets"])

    def decoded(self, complete, data, limit):
        texts = data.heldout_texts()[: self.continued] if self.continued else []
        beginnings = [" ".join(text.split()[: self.beginning]) for text in texts]
        return diversity(answers(complete, data.tokeniser, beginnings)) if texts else {}

    def samples(self, complete, data, prompt):
        return continued(complete, data.tokeniser, [prompt])

    def respond(self, complete, tokeniser, asked, model, params):
        return continued(complete, tokeniser, asked["prompt"])


def continued(complete, tokeniser, prompts) -> list[str]:
    """Return each prompt and what follows it."""
    return [prompt + text for prompt, text in zip(prompts, answers(complete, tokeniser, prompts))]


def answers(complete, tokeniser, prompts) -> list[str]:
    """Return what follows each text as the beginning of a document."""
    # A document begins with the token that ends the one before.
    rows = [[tokeniser.eod, *tokeniser.encode(prompt)] for prompt in prompts]
    return [tokeniser.decode(ids) for ids in complete(rows)]
