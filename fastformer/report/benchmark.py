"""Time and memory of attention over lengths: every variant of the table, and torch as a peer."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from fastformer.attention import VARIANTS, own_fields
from fastformer.core.config import section
from fastformer.core.dtypes import COMPUTE
from fastformer.core.errors import UserError, lookup, require
from fastformer.core.seq import whole
from fastformer.core.trees import count, nbytes
from fastformer.data.atomic import make_directory
from fastformer.models import ModelConfig
from fastformer.report import plots, tables, torch_peer
from fastformer.report.cost import flops

BASELINE = "softmax"  # what every ratio is against
DIRECTIONS = ("causal", "bidirectional")  # by whether a token sees those after it
TABLE = "benchmark.md"
MIN_SECONDS = 0.02  # a timed turn repeats a shorter call until it lasts about this long


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """The section config.benchmark; configs/base.py says what each field means.

    Raises:
      FieldError: an unknown variant, or a size below 1.
    """

    variants: tuple[str, ...]
    lengths: tuple[int, ...]
    batch: int
    repeats: int

    def __post_init__(self) -> None:
        for index, name in enumerate(self.variants):
            lookup(VARIANTS, name, f"variants[{index}]")
        good = all(isinstance(length, int) and length >= 1 for length in self.lengths)
        require(
            bool(self.lengths) and good,
            "lengths",
            self.lengths,
            "one length in tokens or more, each 1 or more",
        )
        for field in ("batch", "repeats"):
            require(getattr(self, field) >= 1, field, getattr(self, field), "1 or more")


class Contestant(NamedTuple):
    """One layer at one length, compiled: what is timed, and what it needs.

    Attributes:
      direction: "causal" or "bidirectional".
      forward, both: run the forward pass, or it and the backward pass, to their end.
      forward_bytes, both_bytes: arguments, results and temporaries of the compiled program; None when
        not known.
      state_bytes: of one sequence of this length.
      parameters: of the layer. flops_per_token: of forward and backward pass.
      compile_seconds: of both programs.
    """

    direction: str
    forward: Callable[[], Any]
    both: Callable[[], Any]
    forward_bytes: int | None = None
    both_bytes: int | None = None
    state_bytes: int | None = None
    parameters: int | None = None
    flops_per_token: float | None = None
    compile_seconds: float | None = None


def run_benchmark(config: ConfigDict, workdir: Path) -> list[dict[str, Any]]:
    """Time the attention layers, print the table, and write it with a picture into the workdir.

    A layer is its projections and what lies between, at the sizes of config.model, on one device. A variant
    that cannot see in the direction of config.model sees in the other, and the table says so.
    Contestants take turns, so that a noisy machine is noisy for all; medians are shown.

    Returns:
      The lines of ``benchmark.jsonl``: seconds, bytes, and the ratio to softmax of the same run.

    Raises:
      UserError: a bad section, or a variant that cannot do what config.model asks.
    """
    options = section(BenchmarkConfig, config, "benchmark")
    model = section(ModelConfig, config, "model")
    variants, unable = _variants(options, model)
    layers = {length: {name: _mixer(model, name, length) for name in variants} for length in options.lengths}
    peer, reason = torch_peer.available()
    unable |= {torch_peer.NAME: reason} if reason else {}
    rows: list[dict[str, Any]] = []
    make_directory(workdir, "--workdir")
    for length in options.lengths:
        shape, contestants = (options.batch, length, model.width), {}
        for index, name in enumerate(variants, 1):
            contestants[name] = _contestant(layers[length][name], shape, COMPUTE[model.dtype])
            seconds = contestants[name].compile_seconds
            line = f"length {length:,}: {index}/{len(variants)} compiled, {name} in {seconds:.1f} s"
            print(f"benchmark: {line}", flush=True)
        if peer is not None:
            forward, both = torch_peer.layer(peer, shape, _heads(model), model.dtype)
            contestants[torch_peer.NAME] = Contestant(DIRECTIONS[False], forward, both)
        rows += _measure(contestants, options, length)
        _write(rows, unable, config, workdir)
        print(f"benchmark: length {length:,} timed; it and those before are in {workdir}", flush=True)
    print((workdir / TABLE).read_text())
    return rows


def _variants(options: BenchmarkConfig, model: ModelConfig) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the variants to time, and why others are not: of all, those that config.model can have.

    Raises:
      UserError: a variant that was named cannot do what config.model asks.
    """
    unable: dict[str, str] = {}
    for name in VARIANTS if not options.variants else ():
        try:
            _mixer(model, name, options.lengths[0])
        except UserError as error:
            unable[name] = str(error.__cause__).partition(";")[0]
    named = options.variants or [name for name in VARIANTS if name not in unable]
    return tuple(dict.fromkeys((BASELINE, *named))), unable


def _heads(model: ModelConfig) -> tuple[int, int, int]:
    """Return (H, G, K)."""
    return model.heads, model.kv_heads or model.heads, model.key_width


def _mixer(model: ModelConfig, name: str, length: int) -> nn.Module:
    own = {key: value for key, value in model.attention.items() if key in own_fields(name)}
    able = getattr(lookup(VARIANTS, name, "variants"), DIRECTIONS[model.bidirectional])
    both_ways = model.bidirectional if able else not model.bidirectional
    try:
        alone = dataclasses.replace(
            model, pattern=(), bidirectional=both_ways, prefix_lm=False, attention={"name": name, **own}
        )
    except UserError as error:
        raise UserError(f"config.benchmark.variants: {name} cannot be: {error}") from error
    return alone.mixer(0, length, detached=True)


def _contestant(mixer: nn.Module, shape: tuple[int, int, int], dtype: jnp.dtype) -> Contestant:
    batch, length, _ = shape
    seq = whole(batch, length)
    x_BTD, cotangent_BTD = jax.random.normal(jax.random.key(0), (2, *shape), dtype)
    params = nn.unbox(jax.jit(mixer.init)(jax.random.key(1), x_BTD, seq))

    def forward(params: Any, x_BTD: jax.Array) -> jax.Array:
        return mixer.apply(params, x_BTD, seq)[0]

    def both(params: Any, x_BTD: jax.Array) -> Any:
        return jax.vjp(forward, params, x_BTD)[1](cotangent_BTD)

    start = time.perf_counter()
    programs = [jax.jit(fn).lower(params, x_BTD).compile() for fn in (forward, both)]
    seconds = time.perf_counter() - start
    calls = [lambda program=program: jax.block_until_ready(program(params, x_BTD)) for program in programs]
    state = jax.eval_shape(lambda: mixer.init_state(1, length)) if mixer.streaming else None
    card = {"parameters": count(params), "flops_per_token": flops(both, params, x_BTD) / (batch * length)}
    held = nbytes(state) if mixer.streaming else None
    direction = DIRECTIONS[mixer.bidirectional_mode]
    return Contestant(direction, *calls, *map(_peak_bytes, programs), held, compile_seconds=seconds, **card)


def _peak_bytes(program: Any) -> int | None:
    memory = program.memory_analysis()
    if memory is None:
        return None
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return held + memory.temp_size_in_bytes


def _measure(
    contestants: Mapping[str, Contestant], options: BenchmarkConfig, length: int
) -> list[dict[str, Any]]:
    """Return one row a contestant."""
    forward = _times({name: c.forward for name, c in contestants.items()}, options.repeats)
    both = _times({name: c.both for name, c in contestants.items()}, options.repeats)
    rows = []
    for name, contestant in contestants.items():
        row = {"variant": name, "direction": contestant.direction, "length": length, "batch": options.batch}
        row |= {"forward_seconds": forward[name], "forward_backward_seconds": both[name]}
        if BASELINE in contestants:
            row |= {"forward_ratio": forward[name] / forward[BASELINE]}
            row |= {"forward_backward_ratio": both[name] / both[BASELINE]}
        row |= {"forward_peak_bytes": contestant.forward_bytes}
        row |= {"forward_backward_peak_bytes": contestant.both_bytes}
        card = ("state_bytes", "parameters", "flops_per_token", "compile_seconds")
        rows.append(row | {field: getattr(contestant, field) for field in card})
    return rows


def _times(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each call, the calls taking turns."""
    for call in calls.values():
        call()  # the first call pays for what later ones find ready
    turns = {name: max(1, math.ceil(MIN_SECONDS / _time(call, 1))) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            seconds[name].append(_time(call, turns[name]))
    return {name: statistics.median(values) for name, values in seconds.items()}


def _time(call: Callable[[], Any], turns: int) -> float:
    start = time.perf_counter()
    for _ in range(turns):
        call()
    return (time.perf_counter() - start) / turns


def _write(rows: list[dict[str, Any]], unable: dict[str, str], config: ConfigDict, workdir: Path) -> None:
    (workdir / "benchmark.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = _table(rows, unable)
    device, model, options = jax.devices()[0], config.model, config.benchmark
    about = (
        f"Attention layers of {model.heads} heads at width {model.width}, {model.dtype}, "
        f"batch {options.batch}, on one {device.device_kind} ({device.platform}); jax {jax.__version__}. "
        f"Medians of {options.repeats} turns; a ratio is to {BASELINE} at the same length in this run. "
        "A layer is its projections and what lies between. Peak memory, FLOPs and the second time are of "
        "forward and backward pass together; the state is what decoding one sequence of this length keeps."
    )
    picture = "![time and memory over length](benchmark.png)"
    (workdir / TABLE).write_text(f"# Benchmark: {config.name}\n\n{about}\n\n{text}\n\n{picture}\n")
    measures = {
        "forward": ("ms", "forward_seconds", 1e3),
        "forward and backward": ("ms", "forward_backward_seconds", 1e3),
        "memory, forward and backward": ("MB", "forward_backward_peak_bytes", 1e-6),
    }
    panels = [(title, unit, _curves(rows, key, scale)) for title, (unit, key, scale) in measures.items()]
    plots.lines(workdir / "benchmark.png", panels, "length (tokens)")


def _curves(rows: list[dict[str, Any]], key: str, scale: float) -> dict[str, plots.Curve]:
    curves = {}
    for name in dict.fromkeys(row["variant"] for row in rows):
        points = sorted(
            (row["length"], row[key] * scale) for row in rows if row["variant"] == name and row[key]
        )
        if points:
            curves[name] = plots.Curve(*zip(*points))
    return curves


def _cell(value: float | None, show: Callable[[float], str]) -> str:
    return "" if value is None else show(value)


def _table(rows: list[dict[str, Any]], unable: dict[str, str]) -> str:
    headers = (
        "variant",
        "sees",
        "length",
        "forward ms",
        "ratio",
        "forward + backward ms",
        "ratio",
        "peak memory",
        "state",
        "parameters",
        "FLOPs a token",
        "compiling, s",
    )
    lines = [
        (
            row["variant"],
            row["direction"],
            f"{row['length']:,}",
            tables.number(1e3 * row["forward_seconds"], 3),
            tables.number(row.get("forward_ratio"), 3),
            tables.number(1e3 * row["forward_backward_seconds"], 3),
            tables.number(row.get("forward_backward_ratio"), 3),
            tables.nbytes(row["forward_backward_peak_bytes"]),
            _cell(row["state_bytes"], tables.nbytes),
            _cell(row["parameters"], tables.number),
            _cell(row["flops_per_token"], tables.count),
            _cell(row["compile_seconds"], tables.number),
        )
        for row in rows
    ]
    for name, reason in unable.items():
        lines.append((name, "", f"not run: {reason}", *("",) * (len(headers) - 3)))
    return tables.table(headers, lines)
