"""Claims of an experiment: what its results must show, as plain data, checked against them.

A claim is a dict: ``text`` (one line for readers), ``metric`` (dotted, as in a row of results.jsonl:
"quality.bits_per_byte", "state_bytes"), ``lower`` and ``higher`` (each an arm, whose mean over
seeds counts, or a number), and optionally ``by`` (a difference, default 0) and ``times`` (a
factor, default 1). It holds when ``lower * times + by < higher``. So "b is at most 0.01 above a" is
``lower="b", higher="a", by=-0.01``, and "a's state is less than a quarter of b's" is ``times=4``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from fastformer.core.errors import FieldError, UserError, lookup, nearest, require
from fastformer.report import tables

# Numbers of a run's result besides its quality, which depends on the task.
RESULT_METRICS = (
    "parameters",
    "bytes_on_disk",
    "train_tokens_per_second",
    "decode_tokens_per_second",
    "state_bytes",
    "flops_per_token",
    "peak_memory_bytes",
    "wall_seconds",
)
HOLDS, FAILS = "holds", "FAILS"

# One measure of every arm: ``{arm: one number a seed}``.
Samples = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Claim:
    """One claim; the module's docstring says when it holds."""

    text: str
    metric: str
    lower: str | float
    higher: str | float
    by: float = 0.0
    times: float = 1.0

    def __post_init__(self) -> None:
        require(isinstance(self.text, str) and self.text != "", "text", self.text, "a sentence")
        check_metric(self.metric, "metric")
        for field in ("by", "times"):
            require(isinstance(getattr(self, field), (int, float)), field, getattr(self, field), "a number")
        require(self.times > 0, "times", self.times, "above 0")


@dataclass(frozen=True)
class Verdict:
    """What became of a claim: ``holds``, ``FAILS`` or ``not run``, and the numbers it was read from."""

    claim: Claim
    outcome: str
    figures: str

    def __str__(self) -> str:
        return f"{self.outcome}: {self.claim.text} ({self.figures})"


def parse(claims: Sequence[Mapping], arms: Collection[str], where: str) -> tuple[Claim, ...]:
    """Return the claims of an experiment, checked.

    Args:
      arms: those that a claim may name.
      where: the file, for the error.

    Raises:
      UserError: a key, an arm or a metric that does not exist.
    """
    return tuple(_parse(entry, arms, f"{where}: CLAIMS[{index}]") for index, entry in enumerate(claims))


def _parse(entry: Mapping, arms: Collection[str], where: str) -> Claim:
    fields = Claim.__dataclass_fields__
    if not isinstance(entry, Mapping):
        raise UserError(f"{where}: {entry!r:.60} is no claim; it must be a dict with {', '.join(fields)}")
    for key in entry:
        if key not in fields:
            raise UserError(f"{where}.{key}: no such key{nearest(key, fields)} (keys: {', '.join(fields)})")
    missing = [key for key in ("text", "metric", "lower", "higher") if key not in entry]
    if missing:
        raise UserError(f"{where}.{missing[0]}: is missing")
    try:
        for side in ("lower", "higher"):
            if not isinstance(entry[side], (int, float)):
                lookup(dict.fromkeys(arms), entry[side], side)
        return Claim(**entry)
    except FieldError as error:
        raise UserError(f"{where}.{error.field}: {error.message}") from error


def check_metric(metric: str, field: str) -> None:
    """Check that runs have such a metric; which ones their quality has is seen when they have run.

    Raises:
      FieldError: they have not.
    """
    if metric not in RESULT_METRICS and not str(metric).startswith("quality."):
        close = nearest(str(metric), (*RESULT_METRICS, "quality.bits_per_byte"))
        allowed = f"quality.*, {', '.join(RESULT_METRICS)}"
        raise FieldError(field, f"{metric!r} is unknown{close} (allowed: {allowed})")


def check(claim: Claim, samples: Samples) -> Verdict:
    """Return whether a claim holds; ``samples`` are those of its metric."""
    means, shown = [], []
    for side in (claim.lower, claim.higher):
        values = samples.get(side, ()) if isinstance(side, str) else [float(side)]
        means.append(fmean(values) if values else None)
        shown.append(f"{side} {tables.mean_std(values)}" if isinstance(side, str) else tables.number(side))
    figures = f"{claim.metric}: {shown[0]}{_margin(claim)} against {shown[1]}"
    if None in means:
        return Verdict(claim, tables.NOT_RUN, figures)
    holds = means[0] * claim.times + claim.by < means[1]
    return Verdict(claim, HOLDS if holds else FAILS, figures)


def _margin(claim: Claim) -> str:
    times = f", times {claim.times:g}," if claim.times != 1 else ""
    by = f" {'plus' if claim.by > 0 else 'minus'} {abs(claim.by):g}" if claim.by else ""
    return times + by
